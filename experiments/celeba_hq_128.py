"""Faces at 128 x 128 without text, in patches of 8: see celeba_hq_64.py, of which this is the larger size.

mmdiff train experiments/celeba_hq_128.py:seed --workdir runs/seed_128
mmdiff train experiments/celeba_hq_128.py --workdir runs/celeba_hq_128
"""

from mmdiff.config import Config, Data, Diffusion, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    """The seed's network under our recipe; the shift answers for neighbouring pixels being more alike than at 64 x 64."""
    return Config(
        name="celeba_hq_128",
        model=Model(width=768, depth=24, patch=8),
        layout=Layout(markers=False, row_length=256),
        diffusion=Diffusion(shift=2.0),
        data=Data(source="tfds", path="celeb_a_hq/256", caption_key="", image_size=(128, 128), vocabulary="bytes", flip=True),
        optimizer=Optimizer(learning_rate=3e-4, warmup=2500, final=0.1),
        training=Training(
            steps=100_000, batch_size=64, ema=0.9998, checkpoint_every=5000, sample_every=5000, validate_every=5000
        ),
        sampling=Sampling(steps=10),
    )


def seed() -> Config:
    """Su Jianlin's configuration as his code has it: 256 positions of 192 values."""
    return Config(
        name="seed_128",
        model=Model(
            width=768, depth=24, patch=8, bias=True, rope_base=1000.0, places="none", time_embedding="table", zero_head=False
        ),
        layout=Layout(markers=False, row_length=256),
        diffusion=Diffusion(schedule="ddpm", prediction="eps", loss="eps", time_sampling="uniform", reduction="sum"),
        data=Data(source="tfds", path="celeb_a_hq/256", caption_key="", image_size=(128, 128), vocabulary="bytes"),
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
