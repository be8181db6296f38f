"""Six ways for images to enter and leave one transformer, on the same documents (E5: joint.py; each also by itself).

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq --workdir runs/tokenizers/vq
    mmdiff train experiments/lossless_vs_discrete/systems.py:vq_ar --workdir runs/systems/vq_ar

    raw       raw patches, denoised: this project's own path
    read      raw patches that are only read                           Fuyu
    vq_ar     VQ codes, next-token prediction in one vocabulary        LWM, Chameleon, LlamaGen
    fsq_ar    the same with FSQ codes
    masked    VQ codes, masked prediction and parallel drawing         MaskGIT, Show-o
    v2l       words of a language model as codes, next-token           V2L's tokens, in a model of our own

    pixels    pixels one after another, of images alone: how many bits these hold at most (rate.py)        PixelCNN++

Width, depth, blocks, positions, data and optimiser are the same; parameters differ by what stands at an image's positions.
Any other tokenizer of 32 x 32 images at patches of 4: --data.tokenizer FOLDER.
"""

import dataclasses

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training

TOKENIZERS = "runs/tokenizers"
MIX = (("draw", 0.4), ("caption", 0.3), ("question", 0.3))


def config(name: str = "raw", images: str = "denoised", tokenizer: str = "", **sampling) -> Config:
    codes = bool(tokenizer)
    return Config(
        name=name,
        model=Model(width=128, depth=4, patch=4, block="attention", head_width=32, lossless=not codes),
        layout=Layout(row_length=192, images=images, max_grid=16),
        data=Data(source="shapes", size=20000, max_objects=2, generator=MIX, tokenizer=tokenizer),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        training=Training(steps=1600, batch_size=16, ema=0.99, validate_every=400, sample_every=800, checkpoint_every=400),
        sampling=Sampling(**sampling),
    )


raw = config


def read() -> Config:
    return config("read", "read")


def vq_ar() -> Config:
    return config("vq_ar", "next_code", f"{TOKENIZERS}/vq")


def fsq_ar() -> Config:
    return config("fsq_ar", "next_code", f"{TOKENIZERS}/fsq")


def masked() -> Config:
    return config("masked", "masked_code", f"{TOKENIZERS}/vq", steps=12)


def v2l() -> Config:
    """Eight words about the image, then one for each patch: 72 codes. (The original asks a frozen language model about them:
    experiments/frozen_lm/.)"""
    return config("v2l", "next_code", f"{TOKENIZERS}/v2l")


def pixels() -> Config:
    cfg = config("pixels", "next_pixel")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, patch=1, sparse="strided"),
        layout=dataclasses.replace(cfg.layout, row_length=1032, max_grid=32, text_drop=1.0),
        data=dataclasses.replace(cfg.data, generator=(("draw", 1.0),)),
        training=dataclasses.replace(cfg.training, batch_size=4, sample_every=0),
    )
