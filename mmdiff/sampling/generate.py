"""The public face of a trained model: generate, caption, inpaint, score.

Documents of one call are sampled together (`mmdiff.sampling.session`) and do not depend on one another: every random number
comes from a document's own key.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.adapters.slices import Slices
from mmdiff.config_files import run_config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.diffusion import grids
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.image_paths.base import ImagePath, image_path
from mmdiff.layout import ImagePiece, ImagePlan, Piece, image_grid, laid_length, text_pieces
from mmdiff.models.network import Network
from mmdiff.sampling import text
from mmdiff.sampling.session import Options, Session, fold

ABOUT_IMAGES = ("steps", "solver", "grid", "guidance", "guidance_interval", "guidance_rescale", "autoguidance")
GROUP = 64  # documents sampled together; more of them only cost memory


class Model:
    """A trained model and its vocabulary: generate, caption, inpaint, score."""

    def __init__(
        self,
        cfg: config.Config,
        params: dict[str, Any],
        vocabulary: Vocabulary,
        mesh: Mesh | None = None,
        between: Callable[[], None] = lambda: None,
        tuned: Mapping[tuple[str, int], Sequence[float]] | None = None,
        weak: "Model | None" = None,
        tokenizer: Any = None,
    ):
        """`params` lie on `mesh`, if there is one; `between` is called between the programs that `generate` runs.

        `tuned`: noise levels found for this model, by solver and number of steps (mmdiff/sampling/tuning.py). `weak`: the
        weaker model of autoguidance. `tokenizer` (mmdiff/tokenizers/model.py): of the codes that stand for images, with
        layout.codes.

        Raises:
          ConfigError: the weaker model reads other documents.
        """
        if weak is not None:
            check_weaker(cfg, vocabulary, weak)
        if cfg.front_end.kind != "none":
            tokenizer = Slices(cfg)
        self.cfg, self.vocabulary, self.between, self.tuned = cfg, vocabulary, between, dict(tuned or {})
        self.network = Network.of(cfg, vocabulary.size, mesh)
        self.params = jax.jit(self.network.separate)(params)
        self.special, self.weak, self.tokenizer = text.Special.of(vocabulary), weak, tokenizer

    @property
    def path(self) -> ImagePath:
        """How images enter and leave this model."""
        return image_path(self.cfg.layout)

    def options(self, **changes) -> Options:
        """Sampling options: the configuration's, with `changes`; `grid` is the one that "auto" stands for.

        Raises:
          ConfigError: an unknown option, or one that this model cannot follow.
        """
        defaults = self.cfg.sampling
        names = ("steps", "solver", "grid", "guidance", "guidance_interval", "guidance_rescale", "max_tokens", "max_images")
        known = [f.name for f in dataclasses.fields(Options)]
        for name in changes:
            if name not in known:
                raise config.ConfigError(f"unknown sampling option {name!r}{config.suggest(name, known)}")
        for name in changes:
            config.require(
                name in self.path.HEEDED or name not in ABOUT_IMAGES or changes[name] == getattr(defaults, name, 1.0),
                f"{name}={changes[name]!r} has no meaning with layout.images={self.cfg.layout.images!r}; leave it out.",
            )
        options = Options(**{name: getattr(defaults, name) for name in names} | changes)
        config.require(
            options.solver != "few_step" or self.cfg.model.step_input,
            "solver='few_step' needs a model trained for it: mmdiff train --init WORKDIR --few-step --workdir NEW.",
        )
        learnt = self.cfg.few_step.guidance
        config.require(
            options.solver != "few_step" or options.guidance == 1 or learnt == 1,
            f"guidance={options.guidance:g}: this model's steps have learnt a guidance of {learnt:g}; leave it at 1.",
        )
        config.require(
            options.autoguidance == 1 or self.weak is not None,
            f"autoguidance={options.autoguidance:g} needs a weaker model: --weak RUN or RUN:STEP, mmdiff.load(run, weak=...).",
        )
        found = (options.solver, options.steps) in self.tuned
        there = ", ".join(f"{solver} {steps}" for solver, steps in sorted(self.tuned)) or "none"
        config.require(
            options.grid != "tuned" or found,
            f"no grid was tuned for {options.solver} with steps={options.steps} (there: {there}); make one with mmdiff "
            f"tune-grid WORKDIR --solver {options.solver} --steps {options.steps}, or take another grid.",
        )
        if options.grid == "auto":
            return dataclasses.replace(options, grid="tuned" if found else grids.usual(options.solver))
        return options

    def noise_levels(self, options: Options) -> np.ndarray:
        """The levels sigma that a solver visits with these options, float64, the last one 0.

        Raises:
          ValueError: there are none.
        """
        if options.grid == "tuned":
            return np.append(self.tuned[options.solver, options.steps], 0.0)
        count, sampling = grids.intervals(options.solver, options.steps), self.cfg.sampling
        return grids.make_grid(options.grid, count, sampling.sigma_max, sampling.sigma_min, self.cfg.diffusion.shift)

    def generate(self, documents: Sequence[Document], **options) -> list[Document]:
        """Continue each prompt until the model ends it or a budget is spent.

        Args:
          documents: prompts; `IMG` in a prompt asks for an image at that place.
          options: see `Options`.
        Returns:
          finished documents: the prompt's segments (IMG replaced by the image drawn), then what the model added.
          `extra["ended"]` says whether the model ended the document by itself.
        Raises:
          ConfigError: an invalid option. DataError: a prompt that cannot be read, or is longer than a training row.
        """
        if isinstance(documents, Document):
            raise DataError("generate takes a list of documents: generate([document]).")
        chosen = self.options(**options)
        return self._generate(list(documents), chosen, None)

    def inpaint(self, image: Image | np.ndarray, mask: np.ndarray, prompt: str = "", **options) -> Image:
        """Repaint part of an image.

        Args:
          image: uint8 [h, w, 3]; mask: bool [h, w], True = repaint; prompt: text that describes the image.
        Returns:
          the image with every pixel outside the mask unchanged.
        """
        config.require(
            self.cfg.layout.images == "denoised",
            f"a model with layout.images={self.cfg.layout.images!r} does not repaint: only one that denoises raw patches can.",
        )
        image = image if isinstance(image, Image) else Image(image)
        mask = np.asarray(mask, bool)
        if mask.shape != image.pixels.shape[:2]:
            raise DataError(f"mask {mask.shape} does not match the image {image.pixels.shape[:2]} (height, width).")
        chosen = self.options(**options | {"image_size": image.pixels.shape[:2], "max_tokens": 0})
        document = Document(*([prompt] if prompt else []), IMG)
        return self._generate([document], chosen, (image, mask))[0].images[-1]

    def score(self, documents: Sequence[Document], **options) -> list[dict[str, float]]:
        """Likelihoods of documents; see `mmdiff.sampling.score.score`."""
        from mmdiff.sampling.score import score

        return score(self, documents, **options)

    def _check_length(self, document: Document, number: int, size: tuple[int, int] | None) -> None:
        """Refuse a prompt that no training row could hold; an image of unknown size counts as one patch."""
        limit, patch = self.cfg.layout.row_length, self.cfg.model.patch
        grid = image_grid(*size, patch, self.tokenizer) if size else (1, 1)
        pieces: list[Piece] = []
        for segment in document.segments:
            asked = segment is IMG
            pieces += (
                [ImagePiece(None, *grid)] if asked else text_pieces(Document(segment), self.vocabulary, patch, self.tokenizer)
            )
        images = [p for p in pieces if isinstance(p, ImagePiece)]
        last = [p.patches is None and p is pieces[-1] for p in images]  # nothing reads it clean: only its noised block
        plans = [ImagePlan(clean=not it, noised=int(it)) for it in last]
        length = laid_length(pieces, plans, dataclasses.replace(self.cfg.layout, context="clean"), end=False)
        if length > limit:
            raise DataError(
                f"prompt {number} needs {length} positions but the model was trained with layout.row_length={limit}: "
                "shorten the text, or use fewer or smaller images."
            )

    def _code_size(self, options: Options) -> Options:
        """With the one image size that the tokenizer knows; the model chooses how many codes an image of it has, if the
        tokenizer leaves that open."""
        size = self.tokenizer.size
        config.require(
            options.image_size in (None, size),
            f"image_size={options.image_size}: this model knows images of {size[0]}x{size[1]} alone; leave it out.",
        )
        return dataclasses.replace(options, image_size=None if self.tokenizer.dynamic else size)

    def _generate(self, documents, options: Options, known) -> list[Document]:
        if options.image_size is not None:
            config.check_image_size(*options.image_size, self.cfg.model.patch, "image_size")
        if self.tokenizer is not None:
            options = self._code_size(options)
        for number, document in enumerate(documents, 1):
            if self.cfg.layout.images == "read" and any(segment is IMG for segment in document.segments):
                raise DataError(f"prompt {number} asks for an image, and this model only reads them (layout.images='read').")
            self._check_length(document, number, options.image_size)
        seeds = options.seed
        if isinstance(seeds, int):
            root = jax.random.key(seeds)
            keys = fold(jnp.broadcast_to(root, len(documents)), np.arange(len(documents)))
        else:
            if len(seeds) != len(documents):
                raise config.ConfigError(f"seed has {len(seeds)} entries for {len(documents)} documents.")
            keys = jnp.stack([jax.random.fold_in(jax.random.key(s), 0) for s in seeds])
        finished: list[Document] = []
        groups = max(1, -(-len(documents) // GROUP))
        size = -(-len(documents) // groups)  # groups of one size: one program for all of them but perhaps the last
        for start in range(0, len(documents), size or 1):
            chosen = slice(start, start + size)
            finished += Session(self, documents[chosen], keys[chosen], options, known).run()
        return finished


def check_weaker(cfg: config.Config, vocabulary: Vocabulary, weak: Model) -> None:
    """Raises ConfigError for a model that cannot draw the same documents side by side with one of `cfg`."""

    def must_agree(cfg: config.Config, vocabulary: Vocabulary) -> tuple:
        model, diffusion = cfg.model, cfg.diffusion
        layout = model.patch, model.positions, model.time == "token", cfg.layout.markers
        return vocabulary.fingerprint, *layout, diffusion.schedule, diffusion.prediction

    config.require(
        must_agree(cfg, vocabulary) == must_agree(weak.cfg, weak.vocabulary),
        "autoguidance: the weaker model must have the vocabulary, the patches, positions and layout, the schedule and the "
        "prediction of this one; take an earlier checkpoint, or a smaller model of otherwise the same configuration.",
    )


def load(workdir: str | Path, *, ema: bool = True, step: int | None = None, weak: str | Path | None = None) -> Model:
    """The model of a run: its newest valid checkpoint.

    Args:
      workdir: folder of a training run.
      ema: the moving average of the parameters, not the last ones.
      step: the checkpoint of this step instead (training.keep_every keeps some).
      weak: the weaker model of autoguidance: another run, or an earlier checkpoint, as RUN:STEP.
    Raises:
      ConfigError, DataError: not a workdir, or no valid checkpoint in it.
    """
    from mmdiff.sampling.tuning import read_tuned
    from mmdiff.training.checkpoint import restore_params

    workdir = Path(workdir)
    cfg = run_config(workdir)
    if cfg.model.network in config.TOKENIZERS:
        raise DataError(f"{workdir} holds an image tokenizer, which draws and reads nothing; see mmdiff.load_tokenizer.")
    vocabulary, tokenizer = Vocabulary.load(workdir / "vocabulary.model", cfg.layout.max_grid), None
    if cfg.layout.codes:
        from mmdiff.training.run import find_tokenizer

        tokenizer = find_tokenizer(cfg, workdir)
        vocabulary = vocabulary.with_codes(tokenizer.codes)
    params, meta = restore_params(workdir / "checkpoints", ema=ema, step=step)
    if meta["vocabulary"] != vocabulary.fingerprint:
        raise DataError(
            f"{workdir / 'vocabulary.model'} ({vocabulary.fingerprint}) is not the vocabulary this checkpoint was "
            f"trained with ({meta['vocabulary']}); restore the original file."
        )
    weaker = None
    if weak is not None:
        run, _, number = str(weak).rpartition(":") if str(weak).rpartition(":")[2].isdecimal() else (str(weak), "", "")
        weaker = load(run, ema=ema, step=int(number) if number else None)
    return Model(cfg, params, vocabulary, tuned=read_tuned(workdir), weak=weaker, tokenizer=tokenizer)
