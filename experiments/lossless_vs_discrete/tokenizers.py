"""Discrete tokenizers of 32 x 32 images at patches of 4, and of 64 x 64 at patches of 8, 64 codes each: minutes on two cores.

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq --workdir runs/tokenizers/vq
    mmdiff evaluate runs/tokenizers/vq --features random
    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:fsq --workdir runs/tokenizers/fsq_faces \\
        --data.source documents --data.path data/faces_32 --data.image_size 32 32

All have the same halves and see the same images; `continuous` has no quantizer, and shows what the halves alone lose. `v2l`
needs a file of words first (experiments/frozen_lm/words.py), and has eight codes more, about the image as a whole.
"""

import dataclasses

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Tokenizer, Training
from mmdiff.data.probes import QUESTIONS
from mmdiff.tokenizers.v2l.words import read_words

CODES = 1024
WORDS = "runs/v2l/words.safetensors"  # of experiments/frozen_lm/words.py

HALVES = Model(network="vit_autoencoder", width=128, depth=2, patch=4, head_width=32)
CONVOLUTIONS = Model(network="conv_autoencoder", width=32, depth=1, patch=4, channels=(1, 2, 2), head_width=32)


def config(tokenizer: Tokenizer | None = None, name: str = "tokenizer_vq", model: Model = HALVES) -> Config:
    """Vector quantisation with unit-length codes of 8 numbers."""
    return Config(
        name=name,
        model=model,
        tokenizer=tokenizer or Tokenizer(quantizer="vq", codes=CODES, code_width=8),
        layout=Layout(markers=False, row_length=64),
        data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes"),
        optimizer=Optimizer(learning_rate=1e-3, warmup=100),
        training=Training(steps=2000, batch_size=32, ema=0.99, validation_rows=256),
    )


vq = config


def simvq() -> Config:
    return config(Tokenizer(quantizer="simvq", codes=CODES, code_width=8), "tokenizer_simvq")


def fsq() -> Config:
    return config(Tokenizer(quantizer="fsq", levels=(8, 5, 5, 5)), "tokenizer_fsq")


def lfq() -> Config:
    return config(Tokenizer(quantizer="lfq", code_width=10), "tokenizer_lfq")


def bsq() -> Config:
    return config(Tokenizer(quantizer="bsq", code_width=10), "tokenizer_bsq")


def rotation() -> Config:
    """`vq` with the rotation trick in place of straight-through gradients."""
    return config(Tokenizer(quantizer="vq", codes=CODES, code_width=8, gradient="rotation"), "tokenizer_rotation")


def continuous() -> Config:
    return config(Tokenizer(quantizer="none", code_width=8), "tokenizer_continuous")


def convolutional() -> Config:
    """`vq` between convolutions, at four times the operations a step."""
    return config(name="tokenizer_convolutional", model=CONVOLUTIONS)


def gan() -> Config:
    """`convolutional` with a discriminator, from step 1,000 on."""
    settings = Tokenizer(quantizer="vq", codes=CODES, code_width=8, error="l1", adversarial=0.5, adversarial_start=1000)
    return config(settings, "tokenizer_gan", CONVOLUTIONS)


def latents() -> Config:
    """One-dimensional: 32 codes for the image as a whole."""
    settings = Tokenizer(quantizer="vq", codes=CODES, code_width=8, latents=32)
    return config(settings, "tokenizer_latents", dataclasses.replace(HALVES, depth=4))


def v2l() -> Config:
    """Subwords of a language model at each place, under eight of its words about the image as a whole."""
    words = read_words(WORDS)
    (codes, width), global_codes = words.local.shape, len(words.global_)
    settings = Tokenizer(
        quantizer="v2l",
        words=WORDS,
        codes=codes,
        code_width=width,
        global_codes=global_codes,
        global_tokens=min(8, global_codes),
        tower=words.tower,
        commitment=1.0,
    )
    return config(settings, "tokenizer_v2l")


def v2l_residual() -> Config:
    """`v2l` whose decoder adds what it reads of the words; as published it goes on with nothing else."""
    cfg = v2l()
    return dataclasses.replace(cfg, name="tokenizer_v2l_residual", tokenizer=dataclasses.replace(cfg.tokenizer, residual=True))


LARGER = Model(network="vit_autoencoder", width=192, depth=2, patch=8, head_width=32)


def larger(tokenizer: Tokenizer, name: str) -> Config:
    """Of 64 x 64 pixels, for the readers of E4 (readers.py), from the images that these are asked about. From others:
    --data.source shapes --data.generator draw 1."""
    cfg = config(tokenizer, name, LARGER)
    kinds = tuple((kind, 1.0) for kind in QUESTIONS)
    data = Data(source="probes", generator_image_size=64, vocabulary="bytes", generator=kinds)
    layout = dataclasses.replace(cfg.layout, row_length=128)  # some questions are about two images
    return dataclasses.replace(cfg, data=data, layout=layout, training=dataclasses.replace(cfg.training, batch_size=8))


def vq_64() -> Config:
    return larger(Tokenizer(quantizer="vq", codes=CODES, code_width=8), "tokenizer_vq_64")


def fsq_64() -> Config:
    return larger(Tokenizer(quantizer="fsq", levels=(8, 5, 5, 5)), "tokenizer_fsq_64")


def continuous_64() -> Config:
    return larger(Tokenizer(quantizer="none", code_width=8), "tokenizer_continuous_64")


def v2l_64() -> Config:
    return larger(v2l().tokenizer, "tokenizer_v2l_64")
