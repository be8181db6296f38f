"""Small configurations of the rivals."""

from mmdiff.config import Config, Data, Layout, Model

SIZE = 16, 32  # height and width: one resolution of the U-Net without attention, one with
SHAPES = {
    "unet": {"width": 8, "depth": 1, "channels": (1, 2), "head_width": 8},
    "uvit": {"width": 48, "depth": 3, "head_width": 16},
    "dit": {"width": 48, "depth": 2, "head_width": 16},
}
RIVALS = list(SHAPES)


def experiment(kind: str, size=SIZE, **model) -> Config:
    model = {"patch": 4, "lossless": kind == "unet", "compute": "float32"} | SHAPES[kind] | model
    count = size[0] * size[1] // model["patch"] ** 2
    return Config(
        model=Model(network=kind, **model),
        layout=Layout(row_length=2 * count, markers=False),
        data=Data(image_size=size),
    )
