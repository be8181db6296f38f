"""Captioned face photographs at 64 x 64: one hour on two CPU cores.

The data are any folder in the ImageFolder convention, prepared once. For CelebA images with captions in `caption_en`:

    mmdiff prepare celeba --out data/faces_64 --image-size 64x64 --caption-key caption_en
    mmdiff train experiments/faces_64.py --workdir runs/faces_64
"""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="faces_64",
        model=Model(width=256, depth=6, patch=8, block="attention", head_width=32),
        layout=Layout(row_length=240, noised_copies=2),
        data=Data(source="documents", path="data/faces_64", order="both"),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=200),
        training=Training(
            steps=6000, batch_size=8, accumulate=4, ema=0.999, checkpoint_every=500, sample_every=1000, validate_every=500
        ),
        sampling=Sampling(steps=10, guidance=1.5),
    )
