"""The demo: coloured shapes, drawn from captions, described, asked about and changed. Ten minutes on two CPU cores."""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="quickstart",
        model=Model(width=192, depth=6, patch=8, key_width=64),
        layout=Layout(row_length=160),
        data=Data(source="shapes", size=20000, generator_image_size=32, max_objects=2, vocabulary_size=512),
        optimizer=Optimizer(learning_rate=2e-3, warmup=200),
        training=Training(steps=3000, batch_size=12, ema=0.999, checkpoint_every=1000),
        sampling=Sampling(steps=10, guidance=1.5),
    )
