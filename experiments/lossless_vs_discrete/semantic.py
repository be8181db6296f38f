"""Tokenizers of what a frozen encoder says of 32 x 32 images: LaVIT, two that differ from it in one thing, and SEED.

    python experiments/stand_ins/two_tower.py --side 32 --patch 4 --out runs/stand_ins/two_tower_32
    mmdiff train experiments/lossless_vs_discrete/semantic.py:lavit --workdir runs/tokenizers/lavit
    mmdiff train experiments/lossless_vs_discrete/semantic.py:seed_pairs --workdir runs/tokenizers/seed_pairs
    mmdiff train experiments/lossless_vs_discrete/semantic.py:seed --workdir runs/tokenizers/seed
    mmdiff train experiments/lossless_vs_discrete/systems.py:lavit --workdir runs/systems/lavit

`lavit_fixed` keeps every patch; in the merger of `lavit_bidirectional` a patch reads all that are kept (lavit_arms.py).
`seed_pairs` is the first stage of `seed`. `lavit_64`, `seed_pairs_64` and `seed_64` are for the readers of E4 (readers.py), on
`two_tower.py` as it is without options, 64 x 64 pixels at patches of 8. With a real encoder: --tokenizer.encoder FOLDER
(CLIP's, as Hugging Face keeps it), images of any size; its features then decide how many codes there are.
"""

import dataclasses

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Tokenizer, Training
from mmdiff.config_files import replaced
from mmdiff.data.probes import QUESTIONS

ENCODER = "runs/stand_ins/two_tower_32"
PAIRS = "runs/tokenizers/seed_pairs"
CODE_WIDTH, QUERIES = 16, 8
CODEBOOK = {"quantizer": "vq", "codes": 512, "decay": 0.95, "restart": 0.3}  # quick to follow: else few live at first
ONE_CAPTION = (("draw", 1.0),)


def config(name: str = "lavit", **changes) -> Config:
    """LaVIT: of 64 features a third is kept, each as one of 512 codes of 16 numbers, compared by direction."""
    return Config(
        name=f"tokenizer_{name}",
        model=Model(network="lavit", width=128, depth=4, patch=4, head_width=32),
        tokenizer=Tokenizer(code_width=CODE_WIDTH, encoder=ENCODER, depth=2, **CODEBOOK, **changes),
        layout=Layout(markers=False, row_length=64),
        data=Data(source="shapes", generator=ONE_CAPTION, max_objects=2, vocabulary="bytes"),
        optimizer=Optimizer(learning_rate=1e-3, warmup=100),
        training=Training(steps=2000, batch_size=16, ema=0.99, validation_rows=256),
    )


lavit = config


def lavit_fixed() -> Config:
    return config("lavit_fixed", keep=1.0)


def lavit_bidirectional() -> Config:
    return config("lavit_bidirectional", causal=False)


def seed() -> Config:
    """SEED: 8 codes for an image, of the Q-Former that `seed_pairs` has trained."""
    settings = Tokenizer(
        code_width=CODE_WIDTH,
        normalise=False,
        commitment=1.0,
        encoder=ENCODER,
        depth=2,
        latents=QUERIES,
        **CODEBOOK,
    )
    cfg = config()
    model = dataclasses.replace(cfg.model, network="seed")
    training = dataclasses.replace(cfg.training, steps=3000, init=PAIRS)
    return dataclasses.replace(cfg, name="tokenizer_seed", model=model, tokenizer=settings, training=training)


def seed_pairs() -> Config:
    """The first stage of `seed`: its Q-Former, from images and their captions. A row holds one pair, its words are pieces."""
    cfg = seed()
    return dataclasses.replace(
        cfg,
        name="tokenizer_seed_pairs",
        tokenizer=dataclasses.replace(cfg.tokenizer, stage=1),
        layout=Layout(row_length=104, images="read", max_grid=16, text_drop=0.0),
        data=dataclasses.replace(cfg.data, vocabulary="auto"),
        training=dataclasses.replace(cfg.training, steps=600, batch_size=32, init="", sample_every=0),
    )


ENCODER_64, PAIRS_64 = "runs/stand_ins/two_tower", "runs/tokenizers/seed_pairs_64"
LARGER = {"model.patch": 8, "tokenizer.encoder": ENCODER_64, "data.generator_image_size": 64}
ASKED_ABOUT = LARGER | {
    "data.source": "probes",
    "data.generator": tuple((kind, 1.0) for kind in QUESTIONS),
    "layout.row_length": 128,  # some questions are about two images
    "training.batch_size": 8,
    "sampling.steps": 4,  # readers need a hundred thousand images
}


def lavit_64() -> Config:
    return replaced(config(), ASKED_ABOUT | {"name": "tokenizer_lavit_64"})


def seed_64() -> Config:
    return replaced(seed(), ASKED_ABOUT | {"name": "tokenizer_seed_64", "training.init": PAIRS_64})


def seed_pairs_64() -> Config:
    return replaced(seed_pairs(), LARGER | {"name": "tokenizer_seed_pairs_64"})
