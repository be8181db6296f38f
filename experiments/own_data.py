"""A small model on any prepared folder: mmdiff train experiments/own_data.py --workdir runs/mine --data.path data/mine"""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="own_data",
        model=Model(width=256, depth=8, patch=8),
        layout=Layout(row_length=256),
        data=Data(source="documents", path="data/mine", order="both"),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        training=Training(steps=5000, batch_size=8, ema=0.999, checkpoint_every=500),
        sampling=Sampling(steps=10, guidance=1.5),
    )
