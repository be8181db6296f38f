"""Configuration of discrete image tokenizers (a part of mmdiff/config.py)."""

import dataclasses
from typing import Literal

from mmdiff.config_model import require

HEEDED = {  # fields that mean something to one quantizer or the other; elsewhere they must keep their defaults
    "vq": ("codes", "code_width", "update", "normalise", "gradient", "decay", "restart", "commitment"),
    "simvq": ("codes", "code_width", "commitment"),
    "fsq": ("levels",),
    "lfq": ("code_width", "commitment", "entropy"),
    "none": ("code_width",),
    "v2l": ("codes", "code_width", "commitment", "words", "global_codes", "global_tokens", "tower", "residual"),
}
Name = Literal["vq", "simvq", "fsq", "lfq", "none", "v2l"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower of CLIP's form that a v2l tokenizer holds, frozen; the defaults are those of the stand-in
    (experiments/stand_ins/two_tower.py)."""

    side: int = 64
    """Pixels of the square images that it sees; others are resized."""
    patch: int = 8
    width: int = 192
    hidden: int = 384
    """Inner width of its MLPs."""
    layers: int = 4
    heads: int = 6
    activation: Literal["quick_gelu", "gelu"] = "gelu"

    def __post_init__(self):
        for name in ("side", "patch", "width", "hidden", "layers", "heads"):
            value = getattr(self, name)
            require(value >= 1, f"tokenizer.tower.{name}={value} must be at least 1.")
        require(
            self.side % self.patch == 0 and self.width % self.heads == 0,
            f"tokenizer.tower: side={self.side} must be a multiple of patch={self.patch}, and width={self.width} of "
            f"heads={self.heads}: take them from config.json of the network that it belongs to.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What stands between the halves of an autoencoder (model.network="conv_autoencoder" or "vit_autoencoder"), and its loss
    (mmdiff/tokenizers/)."""

    quantizer: Name = "vq"
    """`none`: the continuous twin, whose codes are real numbers: what the halves could do without quantisation."""
    codes: int = 1024
    """vq, simvq: size of the codebook. v2l: of the local one, the language model's vocabulary."""
    code_width: int = 8
    """vq, simvq, none: numbers of a code. lfq: its bits. v2l: width of a word's embedding."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: values of each number of a code."""
    latents: int = 0
    """vit_autoencoder: this many codes for the image as a whole; 0: one for each patch."""
    update: Literal["ema", "loss"] = "ema"
    """vq: how the codebook learns."""
    normalise: bool = True
    """vq: compare directions only."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """vq: what the encoder is told."""
    decay: float = 0.99
    """vq with update="ema": of the moving average."""
    restart: float = 0.1
    """vq with update="ema": a code used less than this share of the average starts anew; 0: never."""
    commitment: float = 0.25
    """vq, simvq, lfq, v2l: weight of the distance from the encoder's output to its code."""
    entropy: float = 0.1
    """lfq: weight of the entropy term."""
    words: str = ""
    """v2l: file of words and their embeddings (mmdiff/tokenizers/v2l/words.py), read when training starts."""
    global_codes: int = 1
    """v2l: size of the global codebook."""
    global_tokens: int = 8
    """v2l: how many words describe an image as a whole."""
    tower: Tower = Tower()
    """v2l: what chooses them."""
    residual: bool = False
    """v2l: add what the decoder reads of the words to its map, where the original puts it in the map's place."""
    error: Literal["l1", "l2"] = "l2"
    adversarial: float = 0.0
    """Weight of the discriminator's opinion, relative to the gradient of the rest at the last layer; 0: no discriminator."""
    adversarial_start: int = 0
    """Steps before the discriminator counts and learns."""
    perceptual: float = 0.0
    """Weight of the distance in features of `perceptual_weights`."""
    perceptual_weights: str = ""
    """File of VGG-16 weights (a .safetensors or .npz), which the user supplies."""

    def __post_init__(self):
        told = {name for names in HEEDED.values() for name in names} - set(HEEDED.get(self.quantizer, ()))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.name not in told or value == field.default,
                f"tokenizer.{field.name}={value!r} has no meaning with tokenizer.quantizer={self.quantizer!r}; leave it at its "
                f"default, {field.default!r}, or change tokenizer.quantizer.",
            )
        for name in ("codes", "code_width"):
            value = getattr(self, name)
            require(value >= 1, f"tokenizer.{name}={value} must be at least 1.")
        if self.quantizer == "v2l":
            require(bool(self.words), "tokenizer.words must name a file of words; experiments/frozen_lm/words.py makes one.")
            require(
                1 <= self.global_tokens <= self.global_codes,
                f"tokenizer.global_tokens={self.global_tokens} must be from 1 to tokenizer.global_codes={self.global_codes}.",
            )
        require(self.latents >= 0, f"tokenizer.latents={self.latents} must not be negative (0: one code for each patch).")
        require(0 <= self.decay < 1, f"tokenizer.decay={self.decay} must be in [0, 1).")
        for name in ("restart", "commitment", "entropy", "adversarial", "adversarial_start", "perceptual"):
            value = getattr(self, name)
            require(value >= 0, f"tokenizer.{name}={value} must not be negative.")
        require(
            (self.perceptual > 0) == bool(self.perceptual_weights),
            f"tokenizer.perceptual={self.perceptual} and tokenizer.perceptual_weights={self.perceptual_weights!r} go together: "
            "set both or neither.",
        )
