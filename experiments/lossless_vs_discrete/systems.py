"""Ways for images to enter and leave one transformer, on the same documents (E5: joint.py; each also by itself).

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq --workdir runs/tokenizers/vq
    mmdiff train experiments/lossless_vs_discrete/systems.py:vq_ar --workdir runs/systems/vq_ar
    python experiments/stand_ins/two_tower.py --side 32 --patch 4 --out runs/stand_ins/two_tower_32
    python experiments/stand_ins/qformer.py --encoder runs/stand_ins/two_tower_32 --out runs/stand_ins/qformer
    mmdiff train experiments/lossless_vs_discrete/systems.py:llava --workdir runs/systems/llava

    raw       raw patches, denoised: this project's own path
    read      raw patches that are only read                           Fuyu
    vq_ar     VQ codes, next-token prediction in one vocabulary        LWM, Chameleon, LlamaGen
    fsq_ar    the same with FSQ codes
    masked    VQ codes, masked prediction and parallel drawing         MaskGIT, Show-o
    v2l       words of a language model as codes, next-token           V2L's tokens, in a model of our own
    v2l_residual  the same; its decoder adds what global words say to what local ones say   our ablation
    lavit     as many codes as an image needs, of a frozen encoder's features (semantic.py)      LaVIT
    seed      8 codes of what a Q-Former says of them                                             SEED

    Features of a frozen vision tower:

    llava     each patch through two layers                            LLaVA 1.5
    flamingo  resampled to 8 vectors, read in gated layers             Flamingo
    blip2     8 queries of a Q-Former                                  BLIP-2 trained before (qformer.py)
    emu       8 vectors, predicted one after another, then pixels      Emu

    pixels    pixels one after another, of images alone: how many bits these hold at most (rate.py)        PixelCNN++

Claims, before any was run: (1) arms on codes draw better early, their images being easier to learn; (2) arms on raw patches
answer questions about small differences of colour at least as well at the end. (1) would be wrong if the interval of image
accuracy of `raw` at 1/4 of the operations (tokenizer not counted) lay above those of `vq_ar` and `masked`; (2) if the interval
of question accuracy of an arm on codes lay above those of `raw` and `read` at the end.

Width, depth, blocks, positions, data and optimiser are the same; parameters differ by what stands at an image's positions.
Any other tokenizer of 32 x 32 images at patches of 4: --data.tokenizer FOLDER.
"""

import dataclasses

from mmdiff.config import Config, Data, FrontEnd, Layout, Model, Optimizer, Sampling, Tower, Training
from mmdiff.config_front_end import Kind

ARMS = ("raw", "read", "vq_ar", "fsq_ar", "masked", "v2l", "v2l_residual", "lavit", "seed", "llava", "flamingo", "blip2", "emu")
TOKENIZERS, TOWER = "runs/tokenizers", "runs/stand_ins/two_tower_32"
QFORMER = "runs/stand_ins/qformer"
SIZES = Tower(side=32, patch=4, width=192, hidden=384, depth=4, heads=6, activation="gelu")
MIX = (("draw", 0.4), ("caption", 0.3), ("question", 0.3))


def config(
    name: str = "raw", images: str = "denoised", tokenizer: str = "", front_end: FrontEnd | None = None, **sampling
) -> Config:
    lossless = not tokenizer and front_end is None
    return Config(
        name=name,
        model=Model(width=128, depth=4, patch=4, block="attention", head_width=32, lossless=lossless),
        layout=Layout(row_length=192, images=images, max_grid=16),
        front_end=front_end or FrontEnd(),
        data=Data(source="shapes", size=20000, max_objects=2, generator=MIX, tokenizer=tokenizer),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        training=Training(steps=800, batch_size=16, ema=0.99, validate_every=400, sample_every=800, checkpoint_every=400),
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


def lavit() -> Config:
    """The model writes how many codes an image has, at most one for each of 64 patches."""
    cfg = config("lavit", "next_code", f"{TOKENIZERS}/lavit")
    return dataclasses.replace(cfg, layout=dataclasses.replace(cfg.layout, max_grid=64))


def seed() -> Config:
    return config("seed", "next_code", f"{TOKENIZERS}/seed")


def front(kind: Kind, **settings) -> FrontEnd:
    return FrontEnd(kind=kind, encoder=TOWER, tower=SIZES, **settings)


def llava() -> Config:
    return config("llava", "read", front_end=front("mlp"))


def flamingo() -> Config:
    return config("flamingo", "read", front_end=front("resampler", tokens=8, gated=2))


def blip2() -> Config:
    return config("blip2", "read", front_end=front("qformer", tokens=8, width=128, depth=4, init=QFORMER))


def emu() -> Config:
    return config("emu", "next_embedding", front_end=front("causal_former", tokens=8))


def v2l() -> Config:
    """Eight words about the image, then one for each patch: 72 codes. (The original asks a frozen language model about them:
    experiments/frozen_lm/.)"""
    return config("v2l", "next_code", f"{TOKENIZERS}/v2l")


def v2l_residual() -> Config:
    return config("v2l_residual", "next_code", f"{TOKENIZERS}/v2l_residual")


def pixels() -> Config:
    cfg = config("pixels", "read")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, patch=1, sparse="strided"),
        layout=dataclasses.replace(cfg.layout, images="next_pixel", row_length=1056, max_grid=32, text_drop=1.0),
        data=dataclasses.replace(cfg.data, generator=(("draw", 1.0),)),
        training=dataclasses.replace(cfg.training, batch_size=4, sample_every=0),
    )
