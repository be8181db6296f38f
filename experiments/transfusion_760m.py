"""The 0.76B model of the Transfusion paper (arXiv 2408.11039, table 1) on raw patches: rows of 4096 positions, images of
256x256 in 256 patches of 16x16, two million positions a step.

    mmdiff plan experiments/transfusion_760m.py --topology v5e:8x8
    mmdiff train experiments/transfusion_760m.py --workdir runs/transfusion_760m --data.path data/mine

`config` has gated attention units, two for each of the paper's layers; `attention` has the paper's own blocks.
"""

import dataclasses

from mmdiff.config import Config, Data, Diffusion, Layout, Mesh, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="transfusion_760m",
        model=Model(width=1536, depth=48, patch=16, block="gau", remat="full"),
        layout=Layout(row_length=4096),
        diffusion=Diffusion(image_scale=5.0),
        data=Data(source="documents", path="data/mine", image_size=(256, 256), vocabulary_size=32000),
        optimizer=Optimizer(learning_rate=3e-4, warmup=4000, final=0.05, eps=1e-8, weight_decay=0.1),
        training=Training(
            steps=250_000, batch_size=512, ema=0.9999, checkpoint_every=1000, validate_every=5000, sample_every=5000
        ),
        sampling=Sampling(steps=10, guidance=3.0),
        mesh=Mesh(data=1, fsdp=-1),
    )


def attention() -> Config:
    base = config()
    model = dataclasses.replace(base.model, block="attention", depth=24, head_width=64)
    return dataclasses.replace(base, name="transfusion_760m_attention", model=model)
