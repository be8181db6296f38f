"""Configuration of front ends of features (a part of mmdiff/config.py): a vision tower, and an adapter behind it."""

import dataclasses
from typing import Literal

from mmdiff.config_model import require

HEEDED = {  # fields that mean something to one kind or the other; elsewhere they must keep their defaults
    "none": (),
    "linear": (),
    "mlp": (),
    "resampler": ("tokens", "width", "depth", "heads", "gated"),
    "qformer": ("tokens", "width", "depth", "heads", "init"),
    "causal_former": ("tokens", "width", "depth", "heads", "regression"),
}
COMMON = ("kind", "encoder", "tower", "skipped", "frozen")
Kind = Literal["none", "linear", "mlp", "resampler", "qformer", "causal_former"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes of the vision tower, which must be those of the config.json in front_end.encoder: the default is CLIP ViT-L/14.
    They stand here so that a run, and a plan of one, needs no other folder."""

    kind: Literal["clip", "blip2"] = "clip"
    """Whose names the weights have (mmdiff/pretrained/)."""
    side: int = 224
    """Of the images that it takes, in pixels; others are resized to it."""
    patch: int = 14
    width: int = 1024
    inner: int = 4096
    depth: int = 24
    heads: int = 16
    activation: Literal["quick_gelu", "gelu", "gelu_new", "relu", "silu"] = "quick_gelu"

    def __post_init__(self):
        for name in ("side", "patch", "width", "inner", "depth", "heads"):
            value = getattr(self, name)
            require(value >= 1, f"front_end.tower.{name}={value} must be at least 1.")
        require(
            self.side % self.patch == 0,
            f"front_end.tower.side={self.side} is not a multiple of front_end.tower.patch={self.patch}. Change one of them.",
        )
        require(
            self.width % self.heads == 0,
            f"front_end.tower.width={self.width} is not a multiple of front_end.tower.heads={self.heads}. Change one of them.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontEnd:
    """Vectors of a vision tower in place of an image's patches (mmdiff/adapters/), with layout.images="read" or
    "next_embedding"."""

    kind: Kind = "none"
    """What makes them of the tower's features. `linear`, `mlp`: each patch by itself (LLaVA). `resampler`: learned latents read
    all (Flamingo). `qformer`: learned queries read all (BLIP-2). `causal_former`: learned queries, one after another (Emu)."""
    encoder: str = ""
    """Folder of the tower's weights, as of CLIP or of BLIP-2 (mmdiff/pretrained/). A run keeps them in its checkpoints."""
    tower: Tower = Tower()
    skipped: int = 1
    """Last layers of the tower that are not read: 1 is the hidden state -2 that LLaVA reads."""
    frozen: bool = True
    """The tower is never trained."""
    tokens: int = 0
    """How many vectors stand for an image; `linear`, `mlp`: as many as the tower has patches."""
    width: int = 0
    """Of the adapter's own layers; 0: that of the model."""
    depth: int = 2
    """Layers of the adapter."""
    heads: int = 4
    gated: int = 0
    """resampler: texts read the vectors in layers of their own, one before every so many of the model's, whose gates start at
    zero; the image's positions hold a learned sign in their place. 0: there are none, the vectors stand in the row."""
    init: str = ""
    """qformer: folder of one that was trained by itself (experiments/stand_ins/qformer.py); empty: starts afresh."""
    regression: Literal["l2", "cosine"] = "l2"
    """causal_former with layout.images="next_embedding": how far a prediction is from the next vector."""

    def __post_init__(self):
        heeded = (*(COMMON if self.kind != "none" else ("kind",)), *HEEDED[self.kind])
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                field.name in heeded or value == field.default,
                f"front_end.{field.name}={value!r} has no meaning with front_end.kind={self.kind!r}; leave it at its default, "
                f"{field.default!r}, or change front_end.kind.",
            )
        if self.kind == "none":
            return
        require(bool(self.encoder), f"front_end.kind={self.kind!r} needs front_end.encoder, the folder of a vision tower.")
        require(
            0 <= self.skipped < self.tower.depth,
            f"front_end.skipped={self.skipped} must be from 0 to {self.tower.depth - 1}: front_end.tower.depth is "
            f"{self.tower.depth}.",
        )
        require(
            "tokens" not in heeded or self.tokens >= 1,
            f"front_end.tokens={self.tokens} must be at least 1 with front_end.kind={self.kind!r}: how many vectors stand for an "
            "image.",
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
