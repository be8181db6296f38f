"""Configuration of front ends of features (a part of mmdiff/config.py): a vision tower, and an adapter behind it."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from mmdiff.config_model import require
from mmdiff.config_tokenizer import Tower

HEEDED = {  # kinds, and the fields that mean something to one or the other; elsewhere these must keep their defaults
    "none": (),
    "linear": (),
    "mlp": (),
    "resampler": ("tokens", "width", "depth", "heads", "gated"),
    "qformer": ("tokens", "width", "depth", "heads", "init"),
    "causal_former": ("tokens", "width", "depth", "heads", "regression"),
    "merger": ("tokens", "depth", "init"),
}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "relu", "silu")  # of mmdiff/pretrained/encoder.py
COMMON = ("kind", "encoder", "names", "tower", "skipped", "frozen")
if TYPE_CHECKING:
    Kind = str  # no checker computes a Literal
else:
    Kind = Literal[tuple(HEEDED)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontEnd:
    """Vectors of a vision tower in place of an image's patches (mmdiff/adapters/), with layout.images="read" or
    "next_embedding"."""

    kind: Kind = "none"
    """What makes them of the tower's features. `linear`, `mlp`: each patch by itself (LLaVA). `resampler`: learned latents read
    all (Flamingo). `qformer`: learned queries read all (BLIP-2). `causal_former`: learned queries, one after another (Emu).
    `merger`: the patches that a tokenizer's selector keeps, merged with the rest (LaVIT)."""
    encoder: str = ""
    """Folder of the tower's weights, as of CLIP or of BLIP-2 (mmdiff/pretrained/). A run keeps them in its checkpoints."""
    names: Literal["clip", "blip2"] = "clip"
    """Whose names the weights in `encoder` have."""
    tower: Tower = dataclasses.field(default_factory=Tower)
    """Sizes of the tower, those of the config.json in `encoder`: written here, so that a plan of a run needs no weights."""
    skipped: int = 1
    """Last layers of the tower that are not read: 1 is the hidden state -2 that LLaVA reads. BLIP-2 reads all of its tower,
    which has lost its last layer already: 0."""
    frozen: bool = True
    """The tower is never trained."""
    tokens: int = 0
    """How many vectors stand for an image; `linear`, `mlp`: as many as the tower has patches. merger: at most so many of those
    that are kept."""
    width: int = 0
    """Of the adapter's own layers; 0: that of the model."""
    depth: int = 2
    """Layers of the adapter."""
    heads: int = 4
    gated: int = 0
    """resampler: texts read the vectors in layers of their own, one before every so many of the model's, whose gates start at
    zero; the image's positions hold a learned sign in their place. 0: there are none, the vectors stand in the row."""
    init: str = ""
    """qformer: folder of one that was trained by itself (experiments/stand_ins/qformer.py); empty: starts afresh. merger:
    the run of the LaVIT tokenizer that it and the selector come from."""
    regression: Literal["l2", "cosine"] = "l2"
    """causal_former with layout.images="next_embedding": how far a prediction is from the next vector."""

    def __post_init__(self):
        kinds = ", ".join(map(repr, HEEDED))
        require(self.kind in HEEDED, f"front_end.kind={self.kind!r} must be one of {kinds}.")
        heeded = (*(COMMON if self.kind != "none" else ("kind",)), *HEEDED[self.kind])
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            usual = Tower() if field.name == "tower" else field.default
            require(
                field.name in heeded or value == usual,
                f"front_end.{field.name}={value!r} has no meaning with front_end.kind={self.kind!r}; leave it at its default, "
                f"{usual!r}, or change front_end.kind.",
            )
        if self.kind == "none":
            return
        require(bool(self.encoder), f"front_end.kind={self.kind!r} needs front_end.encoder, the folder of a vision tower.")
        tower = self.tower
        for name in ("side", "patch", "width", "hidden", "depth", "heads"):
            require(
                getattr(tower, name) >= 1,
                f"front_end.tower.{name}={getattr(tower, name)} must be that of the config.json in front_end.encoder.",
            )
        require(tower.embedding == 0, f"front_end.tower.embedding={tower.embedding} has no meaning here; leave it at 0.")
        require(
            tower.activation in ACTIVATIONS,
            f"front_end.tower.activation={tower.activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}.",
        )
        for whole, part in (("side", "patch"), ("width", "heads")):
            a, b = getattr(tower, whole), getattr(tower, part)
            require(
                a % b == 0, f"front_end.tower.{whole}={a} is not a multiple of front_end.tower.{part}={b}. Change one of them."
            )
        require(
            0 <= self.skipped < self.tower.depth,
            f"front_end.skipped={self.skipped} must be from 0 to {self.tower.depth - 1}: front_end.tower.depth is "
            f"{self.tower.depth}.",
        )
        require(
            "tokens" not in heeded or self.tokens >= 1,
            f"front_end.tokens={self.tokens} must be at least 1 with front_end.kind={self.kind!r}: how many vectors stand for "
            "an image.",
        )
        merger = self.kind == "merger"
        require(
            not merger or self.tokens <= tower.count,
            f"front_end.tokens={self.tokens}: with front_end.kind='merger' at most the {tower.count} patches of "
            f"front_end.tower can be kept; set it to {tower.count} or less.",
        )
        require(not merger or bool(self.init), "front_end.kind='merger' needs front_end.init, the run of a LaVIT tokenizer.")
        require(
            not merger or (self.names, self.skipped, self.frozen) == ("clip", 1, True),
            f"front_end.names={self.names!r}, skipped={self.skipped}, frozen={self.frozen}: with front_end.kind='merger' they "
            "must be 'clip', 1 and True, as of the tokenizer.",
        )
        require(self.width >= 0, f"front_end.width={self.width} must not be negative (0: that of the model).")
        require(self.gated >= 0, f"front_end.gated={self.gated} must not be negative (0: none).")
        for name in ("depth", "heads"):
            value = getattr(self, name)
            require(value >= 1, f"front_end.{name}={value} must be at least 1.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns in which an image's vectors stand."""
        side = self.tower.side // self.tower.patch
        return (1, self.tokens) if self.tokens else (side, side)

    def values(self, height: int, width: int, patch: int) -> int:
        """Channel values of an image's pixels that one of its positions carries: patches are shared out evenly."""
        rows, cols = self.grid
        return -(-(height // patch) * (width // patch) // (rows * cols)) * 3 * patch**2
