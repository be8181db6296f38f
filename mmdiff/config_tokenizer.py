"""Configuration of discrete image tokenizers (a part of mmdiff/config.py)."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from mmdiff.config_model import require

HEEDED = {  # quantizers, and the fields that mean something to one or the other; elsewhere these must keep their defaults
    "vq": ("codes", "code_width", "update", "normalise", "gradient", "decay", "restart", "commitment"),
    "simvq": ("codes", "code_width", "commitment"),
    "fsq": ("levels",),
    "lfq": ("code_width", "commitment", "entropy"),
    "bsq": ("code_width", "commitment", "entropy"),
    "none": ("code_width",),
    "v2l": ("codes", "code_width", "commitment", "words", "global_codes", "global_tokens", "residual"),
}
if TYPE_CHECKING:
    Name = str  # no checker computes a Literal
else:
    Name = Literal[tuple(HEEDED)]


# of tokenizers with a frozen encoder; v2l, too, has a tower
SEMANTIC_ONLY = ("encoder", "tower", "depth", "deterministic", "keep", "causal", "stage")
AUTOENCODER_ONLY = ("error", "adversarial", "adversarial_start", "perceptual", "perceptual_weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes of a frozen vision encoder (mmdiff/pretrained/encoder.py), as its config.json has them."""

    side: int = 0
    """Of the images that it takes, in pixels; others are resized. 0: no encoder has been read yet."""
    patch: int = 0
    width: int = 0
    hidden: int = 0
    depth: int = 0
    heads: int = 0
    embedding: int = 0
    """Width of the vector of a whole image."""
    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    @property
    def count(self) -> int:
        """Features of an image: one for each patch."""
        return (self.side // self.patch) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What stands between the halves of a tokenizer (model.network in AUTOENCODERS or SEMANTIC), and its loss
    (mmdiff/tokenizers/)."""

    quantizer: Name = "vq"
    """`none`: the continuous twin, whose codes are real numbers: what the halves could do without quantisation."""
    codes: int = 1024
    """vq, simvq: size of the codebook. v2l: of the local one, the language model's vocabulary."""
    code_width: int = 8
    """vq, simvq, none: numbers of a code. lfq, bsq: its bits. v2l: width of a word's embedding."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: values of each number of a code."""
    latents: int = 0
    """vit_autoencoder, seed: this many codes for the image as a whole; 0: one for each patch."""
    encoder: str = ""
    """lavit, seed: folder of the frozen encoder, in the form of CLIP (mmdiff/pretrained/clip.py). Its vision half is copied
    into the tokenizer, which needs the folder no more."""
    tower: Tower = Tower()
    """lavit, seed: sizes of that encoder; left out, training reads them from the folder. v2l: of the tower that chooses words
    about an image, as the file of words has them."""
    depth: int = 2
    """lavit: layers of the merger, and of the decoder to features. seed: of the Q-Former, of the blocks that reconstruct its
    output, and of those that predict the embedding of the image."""
    deterministic: bool = False
    """lavit: in use, keep a patch if that is likelier than not. False: as published, whether it is kept is drawn at random
    (from the image's own pixels and a key, so that an image's codes are always the same)."""
    keep: float = 1 / 3
    """lavit: share of the patches that the selector is drawn to keep. 1: all of them, always, without a selector."""
    causal: bool = True
    """lavit: in the merger a kept patch reads those before it, as published; False: all that are kept."""
    stage: Literal[1, 2] = 2
    """seed: 1 trains the Q-Former on images with texts; 2 freezes it (training.init names the run of stage 1) and trains the
    codes."""
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
    """vq, simvq, lfq, bsq, v2l: weight of the distance from the encoder's output to its code."""
    entropy: float = 0.1
    """lfq, bsq: weight of the entropy term."""
    words: str = ""
    """v2l: file of words and their embeddings (mmdiff/tokenizers/v2l/words.py), read when a run begins."""
    global_codes: int = 1
    """v2l: size of the global codebook."""
    global_tokens: int = 8
    """v2l: how many words describe an image as a whole."""
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
        names = ", ".join(map(repr, HEEDED))
        require(self.quantizer in HEEDED, f"tokenizer.quantizer={self.quantizer!r} must be one of {names}.")
        told = {name for names in HEEDED.values() for name in names} - set(HEEDED[self.quantizer])
        unread = dict.fromkeys(told, f"tokenizer.quantizer={self.quantizer!r}")
        if self.update == "loss":
            unread |= dict.fromkeys(("decay", "restart"), "tokenizer.update='loss'")
        if self.keep == 1:
            unread["deterministic"] = "tokenizer.keep=1"
        if self.adversarial == 0:
            unread["adversarial_start"] = "tokenizer.adversarial=0"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.name not in unread or value == field.default,
                f"tokenizer.{field.name}={value!r} has no meaning with {unread.get(field.name)}; leave it at its default, "
                f"{field.default!r}, or change that.",
            )
        for name in ("codes", "code_width", "depth"):
            value = getattr(self, name)
            require(value >= 1, f"tokenizer.{name}={value} must be at least 1.")
        if self.quantizer == "v2l":
            require(bool(self.words), "tokenizer.words must name a file of words; experiments/frozen_lm/words.py makes one.")
            require(
                1 <= self.global_tokens <= self.global_codes,
                f"tokenizer.global_tokens={self.global_tokens} must be from 1 to tokenizer.global_codes={self.global_codes}.",
            )
        tower = self.tower
        if self.quantizer == "v2l" or tower != Tower():
            remedy = "take all of it from the file of words" if self.quantizer == "v2l" else "leave it out, training reads it"
            require(
                min(tower.side, tower.patch, tower.width, tower.heads) >= 1
                and tower.side % tower.patch == 0
                and tower.width % tower.heads == 0,
                f"tokenizer.tower: side={tower.side} must be a multiple of patch={tower.patch}, and width={tower.width} of "
                f"heads={tower.heads}: {remedy}.",
            )
        require(self.latents >= 0, f"tokenizer.latents={self.latents} must not be negative (0: one code for each patch).")
        require(0 < self.keep <= 1, f"tokenizer.keep={self.keep} must be above 0, and at most 1.")
        require(0 <= self.decay < 1, f"tokenizer.decay={self.decay} must be in [0, 1).")
        for name in ("restart", "commitment", "entropy", "adversarial", "adversarial_start", "perceptual"):
            value = getattr(self, name)
            require(value >= 0, f"tokenizer.{name}={value} must not be negative.")
        require(
            (self.perceptual > 0) == bool(self.perceptual_weights),
            f"tokenizer.perceptual={self.perceptual} and tokenizer.perceptual_weights={self.perceptual_weights!r} go together: "
            "set both or neither.",
        )
