"""The demo: coloured shapes, drawn from captions, described, asked about and changed. Eight minutes on two CPU cores."""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="quickstart",
        model=Model(width=192, depth=4, patch=8, block="attention", head_width=32),
        layout=Layout(row_length=192, noised_copies=3),
        data=Data(
            source="shapes",
            size=30000,
            max_objects=2,
            generator=(("draw", 0.5), ("caption", 0.15), ("question", 0.1), ("edit", 0.1), ("story", 0.15)),
        ),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        training=Training(
            steps=1500, batch_size=10, accumulate=5, ema=0.998, checkpoint_every=500, sample_every=500, validate_every=500
        ),
        sampling=Sampling(steps=10, guidance=1.5),
    )
