"""All configuration, as frozen dataclasses.

An experiment is a Python file with `def config() -> Config`; what differs from the defaults below is what it writes.
Every field can be overridden on the command line by its dotted name (`--model.width 512`). A value that cannot work is
refused when the dataclass is made, with the remedy, never at step 1. The network's own part is mmdiff/config_model.py,
that of image tokenizers mmdiff/config_tokenizer.py, that of front ends mmdiff/config_front_end.py; what must hold between
the groups mmdiff/config_checks.py.
"""

import dataclasses
import hashlib
import json
from typing import Literal

from mmdiff import config_checks
from mmdiff.config_front_end import FrontEnd
from mmdiff.config_model import AUTOENCODERS, SEMANTIC, TOKENIZERS, ConfigError, Model, require, suggest
from mmdiff.config_tokenizer import Tokenizer, Tower
from mmdiff.orders import Order

__all__ = ["Config", "ConfigError", "Data", "Diffusion", "Layout", "Mesh", "Model", "Optimizer", "Sampling", "Training"]
__all__ += ["AUTOENCODERS", "SEMANTIC", "TOKENIZERS", "FrontEnd", "Tokenizer", "Tower"]
__all__ += ["check_image_size", "require", "suggest"]


CODED = "next_code", "next_vector", "masked_code"  # values of layout.images with which codes stand for images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How documents become rows (mmdiff/layout.py)."""

    row_length: int = 256
    images: Literal[
        "denoised", "next_code", "next_vector", "masked_code", "next_pixel", "next_patch", "next_embedding", "read"
    ] = "denoised"
    """How images enter and leave the model (mmdiff/image_paths/base.py). `denoised`: raw patches, drawn by denoising.
    `next_code`, `masked_code`: codes of data.tokenizer, predicted one after another, or many at a time. `next_vector`: the
    same codes, the numbers of each regressed on the codes before it. `next_pixel`: pixels, predicted one after another.
    `next_patch`: raw patches, each regressed on those before it. `next_embedding`: the same with vectors of `front_end`.
    `read`: raw patches, or vectors of `front_end`, that are read and never drawn."""
    order: Order = "raster"
    """In which order an image's positions are predicted, with `next_...` (mmdiff/orders.py)."""
    markers: bool = True
    """False: images alone. A row then holds noised blocks and nothing else; texts and given images are left out."""
    time_token: bool = False
    """Each noised block begins with a position that holds its noise time (model.time='token')."""
    trailing_context: float = 0.1
    """Probability that an image at the end of its document also gets a clean copy, so that the model sees how to stop."""
    text_drop: float = 0.1
    """Probability that the text before the images of a document is dropped, for classifier-free guidance."""
    context: Literal["clean", "noised"] = "clean"
    """`noised` is the ablation that reproduces Transfusion: one in-place noised copy that later text reads."""
    max_context_u: float = 0.5
    """With `context="noised"`: cap on the noise time of images that something follows."""
    noised_copies: int = 1
    """Noised blocks per learnt image, each at its own noise time. Exact: nobody reads a noised block."""
    max_grid: int = 64
    """Largest number of patch rows or columns the vocabulary can name."""

    def __post_init__(self):
        require(self.row_length >= 4, f"layout.row_length={self.row_length} must be at least 4.")
        for name in ("trailing_context", "text_drop", "max_context_u"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"layout.{name}={value} must be between 0 and 1.")
        require(self.noised_copies >= 1, f"layout.noised_copies={self.noised_copies} must be at least 1.")
        require(self.max_grid >= 1, f"layout.max_grid={self.max_grid} must be at least 1.")
        require(
            self.context == "clean" or self.noised_copies == 1,
            "layout.noised_copies above 1 needs layout.context='clean': an in-place noised image exists only once.",
        )
        name = f"layout.images={self.images!r}"
        require(
            self.images == "denoised" or (self.markers and self.context == "clean" and not self.time_token),
            f"{name} needs layout.markers=True, layout.context='clean' and layout.time_token=False.",
        )
        require(
            self.blocks or self.noised_copies == 1,
            f"{name} has no noised blocks: set layout.noised_copies=1.",
        )
        require(
            self.order == "raster" or (self.in_order and self.images != "next_embedding"),
            f"layout.order={self.order!r} has no meaning with {name}, whose positions are no patches or codes that are "
            "predicted one after another: leave it at 'raster'.",
        )

    @property
    def blocks(self) -> bool:
        """Whether images are learnt in noised blocks; else in the stream itself, where each position reads those before it."""
        return self.images in ("denoised", "masked_code")

    @property
    def codes(self) -> bool:
        """Whether codes stand for images, not raw patches."""
        return self.images in CODED

    @property
    def in_order(self) -> bool:
        """Whether the positions of an image are learnt in the stream, each from those before it."""
        return self.images.startswith("next_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The diffusion process and its loss (mmdiff/diffusion/)."""

    schedule: Literal["flow", "cosine", "ddpm"] = "flow"
    prediction: Literal["x", "eps", "v"] = "x"
    loss: Literal["x", "eps", "v"] = "v"
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = -0.8
    """Mean of logit(1 - u)."""
    time_std: float = 0.8
    weighting: Literal["none", "min_snr", "soft_min_snr", "sigmoid"] = "none"
    weighting_value: float = 5.0
    """min_snr: gamma. soft_min_snr: data standard deviation. sigmoid: bias."""
    shift: float = 1.0
    """Multiplies sigma: more than 1 moves training and sampling towards noise (large images)."""
    clip: float = 0.05
    """Lower bound on the divisor of the v conversion, on both sides of the loss."""
    image_scale: float = 1.0
    """loss = text + image_scale * image."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the channels and pixels of one image; `sum` is the DDPM convention."""

    def __post_init__(self):
        require(self.time_std > 0, f"diffusion.time_std={self.time_std} must be positive.")
        require(self.shift > 0, f"diffusion.shift={self.shift} must be positive.")
        require(0 < self.clip < 1, f"diffusion.clip={self.clip} must be between 0 and 1.")
        require(
            self.weighting not in ("min_snr", "soft_min_snr") or self.weighting_value > 0,
            f"diffusion.weighting_value={self.weighting_value} must be positive for weighting={self.weighting!r}.",
        )
        require(self.image_scale >= 0, f"diffusion.image_scale={self.image_scale} must not be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep:
    """Training for drawing in one to eight evaluations (mmdiff/diffusion/few_step.py), after ordinary training."""

    objective: Literal["none", "meanflow", "difference", "shortcut"] = "none"
    share: float = 0.5
    """Of the noised images, how many learn a step; the others go on learning to denoise."""
    guidance: float = 1.0
    """Strength of the text guidance that the steps learn, so that drawing needs no second evaluation; 1: none."""
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    """Sigmas between which that guidance acts."""

    def __post_init__(self):
        require(0 < self.share <= 1, f"few_step.share={self.share} must be above 0 and at most 1.")
        require(self.guidance >= 0, f"few_step.guidance={self.guidance} must not be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where documents come from (mmdiff/data/)."""

    source: Literal["documents", "shapes", "words", "probes", "tfds"] = "documents"
    path: str = ""
    """documents: a folder with documents.jsonl, or one written by `mmdiff prepare`. tfds: the dataset name."""
    split: str = "train"
    validation_split: str = "test"
    vocabulary: str = "auto"
    """`auto`: the one in the prepared folder, else trained on the data's own text. `bytes`, or a path to a .model file."""
    tokenizer: str = ""
    """Folder of a tokenizer's run, whose codes stand for images (layout.images="next_code", for one). A run keeps a
    copy of the tokenizer."""
    vocabulary_size: int = 512
    """Pieces to train when a vocabulary is trained here."""
    size: int = 20000
    """Generators: number of distinct training documents."""
    image_size: tuple[int, int] | None = None
    """(height, width): centre-crop to this aspect, then resize. None keeps each image's own size."""
    generator: tuple[tuple[str, float], ...] = ()
    """shapes, words, probes: weight of each document kind; empty means the generator's default mix."""
    generator_image_size: int = 32
    max_objects: int = 3
    """shapes: most objects in one scene."""
    flip: bool = False
    """Mirror images at random (only where captions do not name sides)."""
    caption_key: str = "text"
    """tfds: feature that holds the caption; empty for none."""
    order: Literal["as_is", "both"] = "as_is"
    """`both`: documents of one text and one image are read in either order, at random."""

    def __post_init__(self):
        require(self.size >= 1, f"data.size={self.size} must be at least 1.")
        require(self.vocabulary_size >= 300, f"data.vocabulary_size={self.vocabulary_size} must be at least 300 (256 bytes).")
        require(1 <= self.max_objects <= 3, f"data.max_objects={self.max_objects} must be 1, 2 or 3.")
        if self.image_size is not None:
            require(min(self.image_size) >= 1, f"data.image_size={self.image_size} must be positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Update rule and learning-rate schedule (mmdiff/training/optimizer.py)."""

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: Literal["cosine", "linear", "constant", "points"] = "cosine"
    final: float = 0.0
    """The schedule ends at `final * learning_rate`."""
    points: tuple[tuple[int, float], ...] = ()
    """decay="points": (update, factor of learning_rate), straight lines between them; takes the place of warmup and final."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global gradient norm; 0 switches clipping off."""

    def __post_init__(self):
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive.")
        require(self.warmup >= 0, f"optimizer.warmup={self.warmup} must not be negative.")
        require(0 <= self.final <= 1, f"optimizer.final={self.final} must be between 0 and 1.")
        steps = [step for step, _ in self.points]
        require(
            (self.decay == "points") == bool(steps) and steps == sorted(set(steps)),
            f"optimizer.points={self.points} must be given with optimizer.decay='points', and only then, with growing updates.",
        )
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1).")
        require(self.eps > 0, f"optimizer.eps={self.eps} must be positive.")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative.")
        require(self.clip >= 0, f"optimizer.clip={self.clip} must not be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The loop (mmdiff/training/loop.py)."""

    steps: int = 2000
    init: str = ""
    """Folder of a run whose averaged parameters this one starts from; what they lack starts afresh."""
    batch_size: int = 32
    """Rows per optimiser step, over all devices."""
    accumulate: int = 1
    """Split each batch into this many pieces, one after another: the same gradient in less memory."""
    seed: int = 0
    ema: float = 0.999
    ema_start: Literal["ramp", "zero"] = "ramp"
    """`ramp`: the decay grows from 0.1 to `ema`. `zero`: an average that starts at zero and is corrected for it."""
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Also keep the checkpoints of whole multiples of this many steps, for autoguidance and comparisons; 0: none."""
    sample_every: int = 500
    validate_every: int = 500
    validation_rows: int = 64
    max_skips: int = 10
    """Stop after this many steps in a row whose loss or gradient was not finite; their updates are never applied."""
    watchdog: float = 60.0
    """Minutes without a step after which the run ends itself, with the stacks of all threads; 0: never."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "max_skips"):
            require(getattr(self, name) >= 1, f"training.{name}={getattr(self, name)} must be at least 1.")
        for name in ("keep_every", "sample_every", "validate_every", "validation_rows"):
            require(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)} must not be negative (0: never).")
        require(
            self.batch_size % self.accumulate == 0,
            f"training.batch_size={self.batch_size} is not divisible by training.accumulate={self.accumulate}.",
        )
        require(self.watchdog >= 0, f"training.watchdog={self.watchdog} must not be negative (minutes; 0: never).")
        require(0 <= self.ema < 1, f"training.ema={self.ema} must be in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Defaults of `generate` and of the sample sheets; every call may override them."""

    steps: int = 10
    solver: Literal[
        "ddim",
        "midpoint",
        "heun",
        "dpmpp_2m",
        "dpmpp_3m",
        "unipc2",
        "unipc3",
        "dpmpp_2m_sde",
        "ddpm",
        "ddpm_large",
        "few_step",
    ] = "unipc2"
    grid: Literal["auto", "tuned", "uniform_logsnr", "uniform_u", "ddpm_table"] = "auto"
    """`tuned`: found by `mmdiff tune-grid` for this run, solver and number of steps. `auto`: that if it is there, else what
    suits the solver."""
    sigma_max: float = 80.0
    sigma_min: float = 0.01
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    """Sigmas between which guidance acts; outside it the conditional prediction is used alone."""
    guidance_rescale: float = 0.0
    """How much of the contrast that guidance adds to an image is taken back, from 0 to 1."""
    max_tokens: int = 64
    max_images: int = 4
    prompts: tuple[str, ...] = ()
    """Texts drawn on the sample sheets; empty means captions from the validation data."""

    def __post_init__(self):
        require(self.steps >= 1, f"sampling.steps={self.steps} must be at least 1.")
        require(
            0 < self.sigma_min < self.sigma_max,
            f"sampling.sigma_min={self.sigma_min} must be positive and below sampling.sigma_max={self.sigma_max}.",
        )
        require(self.guidance >= 0, f"sampling.guidance={self.guidance} must not be negative.")
        require(0 <= self.guidance_rescale <= 1, f"sampling.guidance_rescale={self.guidance_rescale} must be from 0 to 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices as a grid; -1 means all that remain (mmdiff/parallel/sharding.py says what is split over which axis).

    A run may be resumed on another mesh.
    """

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Rows are split over it as well, and so are stored parameters, optimiser state and moving average."""
    tensor: int = 1
    """Splits each layer: heads, inner widths and the vocabulary."""

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size} must be at least 1, or -1 for all devices that remain.")
        open_ = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        require(
            len(open_) <= 1, f"{' and '.join(open_)} are both -1: only one can take the devices that remain. Set the other."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str = "experiment"
    model: Model = dataclasses.field(default_factory=Model)
    layout: Layout = Layout()
    diffusion: Diffusion = Diffusion()
    few_step: FewStep = FewStep()
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    front_end: FrontEnd = dataclasses.field(default_factory=FrontEnd)
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    sampling: Sampling = Sampling()
    mesh: Mesh = Mesh()

    def __post_init__(self):
        config_checks.check(self)
        if self.data.image_size is not None:
            check_image_size(*self.data.image_size, self.model.patch, "data.image_size")
        if self.data.source in ("shapes", "words", "probes"):
            size = self.data.generator_image_size
            check_image_size(size, size, self.model.patch, "data.generator_image_size")

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of every image, where the configuration says so."""
        side = self.data.generator_image_size
        generated = {"shapes": (side, side), "words": (side, 2 * side), "probes": (side, side)}
        return generated.get(self.data.source, self.data.image_size)

    @property
    def patch_values(self) -> int:
        """Channel values of pixels at one position of a row."""
        if self.front_end.kind == "none" or self.fixed_size is None:
            return 3 * self.model.patch**2
        return self.front_end.values(*self.fixed_size, self.model.patch)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def fingerprint(self) -> str:
        """Hash of every field: equal configurations, equal strings."""
        values = dataclasses.asdict(self)
        if self.front_end == FrontEnd():
            del values["front_end"]  # as before there were any
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The inverse of `to_json`; needs no experiment file.

        Raises:
          ConfigError: unknown field (with a suggestion), wrong type or invalid value.
        """
        from mmdiff.config_files import from_dict

        return from_dict(cls, json.loads(text))


def check_image_size(height: int, width: int, patch: int, where: str) -> None:
    """Raise ConfigError unless both sides are multiples of the patch."""
    if height % patch or width % patch:
        down = (max(height // patch, 1) * patch, max(width // patch, 1) * patch)
        raise ConfigError(
            f"{where}: an image of {height}x{width} is not divisible by model.patch={patch}; "
            f"resize to {down[0]}x{down[1]} (data.image_size) or change model.patch."
        )
