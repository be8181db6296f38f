"""Small images without text, the base of the ablations in experiments/ablations: minutes on two CPU cores.

Any folder of images will do, prepared once; captions, if there are any, are left out. For CelebA images:

    mmdiff prepare celeba --out data/faces_32 --image-size 32x32 --caption-key caption_en
    mmdiff train experiments/faces_32.py --workdir runs/faces_32
    mmdiff sweep experiments/ablations/block.py --budget 3m-per-arm --workdir runs/ablations/block
"""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training


def config() -> Config:
    return Config(
        name="faces_32",
        model=Model(width=192, depth=4, patch=4, key_width=64, head_width=32),
        layout=Layout(markers=False, row_length=64),
        data=Data(source="documents", path="data/faces_32", image_size=(32, 32), vocabulary="bytes", flip=True),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=100),
        training=Training(steps=1000, batch_size=32, accumulate=2, ema=0.998, validation_rows=96),
        sampling=Sampling(steps=10),
    )
