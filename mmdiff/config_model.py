"""Configuration of the network (a part of mmdiff/config.py), and how configurations refuse what cannot work."""

import dataclasses
import difflib
from typing import Literal


class ConfigError(Exception):
    """A configuration that cannot work; the message names the field, the value and the remedy.

    Not a ValueError: tyro catches those while it builds a configuration, and shows a box with exit code 2.
    """


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


DENSE_LIMIT = 1024 * 1024  # queries times keys up to which model.attention="auto" takes the dense form

# fields of Model that mean something to a rival of the transformer; the others must keep their defaults
AUTOENCODERS = ("conv_autoencoder", "vit_autoencoder")
SEMANTIC = ("lavit", "seed")
TOKENIZERS = (*AUTOENCODERS, *SEMANTIC)
RAW_ONLY = ("bottleneck", "overlap", "patch_head", "zero_head", "time", "time_embedding")  # fields about raw patches
HEEDED = ("network", "width", "depth", "patch", "head_width", "attention", "compute", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network. Two GAU layers cost about one attention + SwiGLU layer."""

    network: Literal["transfusion", "unet", "uvit", "dit", "conv_autoencoder", "vit_autoencoder", "lavit", "seed"] = (
        "transfusion"
    )
    """The others are for images alone (they need layout.markers=False): rivals, in mmdiff/models/, and discrete tokenizers, in
    mmdiff/tokenizers/: autoencoders, and two that code what a frozen encoder says of an image, `lavit` and `seed`; of these,
    width, depth, patch and head_width are those of the decoder to pixels."""
    width: int = 256
    depth: int = 8
    patch: int = 4
    """Side of a square patch in pixels; a patch carries 3 * patch^2 values."""
    block: Literal["gau", "attention"] = "gau"
    expansion: int = 2
    """GAU: the gated width is `expansion * width`."""
    key_width: int = 128
    """GAU: width of the one shared query/key head."""
    head_width: int = 64
    """Attention: width of a head; the number of heads is `width / head_width`. unet: the largest width of a head."""
    qk_norm: bool = False
    bias: bool = False
    """Biases in the linear layers of the blocks."""
    rope: Literal["axial", "mixed", "none"] = "axial"
    """`axial`: half of the pairs turn with the row, half with the column. `mixed`: every pair of every head learns its own
    direction in the plane."""
    rope_base: float = 100.0
    positions: Literal["centred", "scaled", "corner", "raster"] = "centred"
    places: Literal["smooth", "learned", "sincos", "none"] = "smooth"
    """How each patch is told, at the input, where in its image it stands; `none` leaves that to RoPE alone."""
    skip: Literal["none", "concat", "lerp"] = "none"
    """Long skips from the first half of the layers to the second."""
    bottleneck: int = 0
    """Patches are projected to this width first; 0: straight to the model's."""
    overlap: int = 0
    """Pixels by which the window that a patch reads and predicts reaches over each of its edges."""
    patch_head: Literal["linear", "conv"] = "linear"
    """`conv` adds two 3x3 convolutions over the whole image, across the edges of its patches."""
    zero_head: bool = True
    """The patch head starts at zero, which x-prediction under the v-loss depends on; LAMB, whose steps are proportional to
    a weight, would hardly ever move it from there."""
    tie_embeddings: bool = False
    lossless: bool = True
    """Demand a width that can hold a patch exactly: at least 3 * patch^2."""
    time: Literal["input", "token", "adaln", "none"] = "input"
    """Where the noise time enters: added to each patch; as a token before each noised block (with layout.time_token); as
    scale, shift and gate of every layer; or nowhere."""
    time_embedding: Literal["smooth", "table"] = "smooth"
    """`smooth`: low-frequency features of u. `table`: the 1000-entry table of the DDPM schedule."""
    step_input: bool = False
    """Also tell each patch the length of the step that it is to take (few_step); no difference where that is 0."""
    sparse: Literal["none", "strided"] = "none"
    """What a position of an image reads of the image: all that its mask allows; or by turns its column and a row's length
    (mmdiff/nn/strided.py), for images that are read in order."""
    attention: Literal["auto", "dense", "blockwise", "pallas"] = "auto"
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on accelerators, float32 on CPU. Parameters are always float32."""
    remat: Literal["none", "dots", "attention", "full"] = "none"
    """What the backward pass recomputes of each layer, from none to all of it: `dots` keeps the results of the matrix
    products with parameters, `attention` those of attention alone, `full` nothing but the layer's input."""

    channels: tuple[int, ...] = (1, 2, 2, 2)
    """unet, conv_autoencoder: channels at each resolution, in units of `width`; `depth` is the number of residual blocks at
    each."""

    def __post_init__(self):
        for name in ("width", "depth", "patch", "expansion", "key_width", "head_width"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value} must be at least 1.")
        values = 3 * self.patch**2
        require(
            0 <= 2 * self.overlap <= self.patch,
            f"model.overlap={self.overlap} must lie between 0 and half of model.patch={self.patch}.",
        )
        require(self.bottleneck >= 0, f"model.bottleneck={self.bottleneck} must not be negative (0: none).")
        require(
            self.time_embedding == "smooth" or self.time in ("input", "token"),
            f"model.time_embedding='table' needs model.time='input' or 'token', not {self.time!r}.",
        )
        if self.network != "transfusion":
            self._check_rival()
        require(
            not self.step_input or self.time_embedding == "smooth",
            "model.step_input=True needs model.time_embedding='smooth': steps are learnt by differentiating in time.",
        )
        if self.lossless and self.network not in ("unet", *TOKENIZERS):
            require(
                not 0 < self.bottleneck < values,
                f"model.bottleneck={self.bottleneck} cannot hold a {self.patch}x{self.patch} patch losslessly: it needs "
                f"{values}. Raise it, or set model.lossless=False.",
            )
            require(
                self.width >= values,
                f"model.width={self.width} cannot hold a {self.patch}x{self.patch} patch losslessly: it needs at least "
                f"{values} (better {2 * values}). Raise model.width, lower model.patch, or set model.lossless=False.",
            )
        if self.network != "transfusion":
            return
        if self.block == "gau":
            require(
                self.key_width % 4 == 0,
                f"model.key_width={self.key_width} must be a multiple of 4: 2-D RoPE turns pairs, half by row, half by "
                "column. Use 64 or 128.",
            )
        else:
            require(
                self.width % self.head_width == 0,
                f"model.width={self.width} is not a multiple of model.head_width={self.head_width}. Change one of them.",
            )
            require(self.head_width % 4 == 0, f"model.head_width={self.head_width} must be a multiple of 4 for 2-D RoPE.")
        require(self.rope_base > 1, f"model.rope_base={self.rope_base} must be above 1.")

    def _check_rival(self) -> None:
        convolutional = self.network in ("unet", "conv_autoencoder")
        heeded = HEEDED + (("channels",) if convolutional else ("lossless",))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.name in heeded or value == field.default,
                f"model.{field.name}={value!r} has no meaning with model.network={self.network!r}; leave it at its default, "
                f"{field.default!r}, or change model.network.",
            )
        if convolutional:
            require(
                bool(self.channels) and min(self.channels) >= 1,
                f"model.channels={self.channels} must be positive, one or more.",
            )
            require(
                self.width % 8 == 0,
                f"model.width={self.width} must be a multiple of 8: {self.network} normalises groups of channels.",
            )
            side = 2 ** (len(self.channels) - 1)
            require(
                self.network == "unet" or self.patch == side,
                f"model.patch={self.patch} must be {side}, the pixels that one code stands for with "
                f"{len(self.channels)} entries in model.channels; change one of them.",
            )
        else:
            require(
                self.width % self.head_width == 0,
                f"model.width={self.width} is not a multiple of model.head_width={self.head_width}. Change one of them.",
            )

    def warnings(self) -> list[str]:
        """What works but is known to be tight, one line each; printed once when a run starts."""
        values = 3 * self.patch**2
        if self.network != "transfusion":
            return []
        if self.width < values:
            return [f"model.width={self.width} < {values}: patches are compressed, this model is not lossless."]
        if self.width < 2 * values:
            return [f"model.width={self.width} < {2 * values} leaves little room beside a {self.patch}x{self.patch} patch."]
        return []


def suggest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for a misspelt name, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
