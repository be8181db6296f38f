"""Faces at 64 x 64 without text: the experiment this project grew from, and our recipe beside it.

Su Jianlin trained a plain pre-norm GAU transformer on raw patches of CelebA-HQ (kexue.fm/archives/9984, and the code beside
it); `seed` is his configuration: 24 layers of width 768, time from a table of 1000 entries added to every patch, eps
predicted under a summed loss, LAMB, a bias-corrected average of decay 0.9999, the ancestral sampler of 1000 steps. His text
says patches of 4 at this size (256 positions), his code keeps patches of 8 (64 positions): `seed` and `seed_patch8`.

    mmdiff train experiments/celeba_hq_64.py:seed --workdir runs/seed_64
    mmdiff train experiments/celeba_hq_64.py --workdir runs/celeba_hq_64                        # our recipe, the same network

CelebA-HQ must be downloaded by hand (tensorflow.org/datasets/catalog/celeb_a_hq says how) and built once, with
`tfds build celeb_a_hq/256 --file_format=array_record`. Any other folder of images: prepare it and add
`--data.source documents --data.path data/mine`.
"""

import dataclasses

from mmdiff.config import Config, Data, Diffusion, Layout, Model, Optimizer, Sampling, Training

DATA = Data(source="tfds", path="celeb_a_hq/256", caption_key="", image_size=(64, 64), vocabulary="bytes")


def config() -> Config:
    """The seed's network under our recipe: x predicted under the v-loss, log-normal noise, AdamW, ten steps to sample."""
    return Config(
        name="celeba_hq_64",
        model=Model(width=768, depth=24, patch=4),
        layout=Layout(markers=False, row_length=256),
        data=dataclasses.replace(DATA, flip=True),
        optimizer=Optimizer(learning_rate=3e-4, warmup=2500, final=0.1),
        training=Training(
            steps=100_000, batch_size=64, ema=0.9998, checkpoint_every=5000, sample_every=5000, validate_every=5000
        ),
        sampling=Sampling(steps=10),
    )


def seed(patch: int = 4) -> Config:
    """Su Jianlin's configuration, with 256 positions at 64 x 64."""
    return Config(
        name=f"seed_64_patch{patch}",
        model=Model(
            width=768,
            depth=24,
            patch=patch,
            bias=True,
            rope_base=1000.0,
            places="none",
            time_embedding="table",
            zero_head=False,
        ),
        layout=Layout(markers=False, row_length=(64 // patch) ** 2),
        diffusion=Diffusion(schedule="ddpm", prediction="eps", loss="eps", time_sampling="uniform", reduction="sum"),
        data=DATA,
        optimizer=Optimizer(
            name="lamb",
            learning_rate=1e-3,
            decay="points",
            points=((0, 0.0), (4000, 1.0), (20_000, 0.5), (40_000, 0.1)),
            b2=0.999,
            eps=1e-7,
            clip=0.0,
        ),
        training=Training(
            steps=500_000,
            batch_size=64,
            ema=0.9999,
            ema_start="zero",
            checkpoint_every=5000,
            sample_every=20_000,
            validate_every=5000,
        ),
        sampling=Sampling(steps=1000, solver="ddpm_large", grid="ddpm_table"),
    )


def seed_patch8() -> Config:
    """As the published code has it at 64 x 64: patches of 8, 64 positions."""
    return seed(patch=8)
