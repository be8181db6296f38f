"""Measuring a model on held-out data. All seeds are fixed: the same model gives the same numbers.

    any data    text_bits_per_byte, x_error, patch_grid_ratio, image_bits_per_dim, image_bits_per_dim_ode, phrase_accuracy,
                phrase_drawn
                sets of images (mmdiff/evaluation/sets.py): frechet_*, fid_inception, kid_*, precision_recall,
                density_coverage, nearest_train_ratio
    shapes      caption_accuracy, image_accuracy, question_accuracy, edit_accuracy, interleaved_validity
    words       read_accuracy, write_accuracy
    probes      probe_accuracy
    tokenizers  psnr, ssim, code_use; of what they give back image_accuracy, write_accuracy, and what compares sets

A metric may report several numbers; means of scores come with their standard error, `<name>_stderr`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmdiff import config
from mmdiff.data import shapes as shapes_data
from mmdiff.data import words as words_data
from mmdiff.data.sources import Source
from mmdiff.document import Text
from mmdiff.evaluation import probes, reconstruction, sets, shapes, words
from mmdiff.evaluation.features import NAMES
from mmdiff.evaluation.judge import phrases_drawn
from mmdiff.evaluation.likelihood import image_bits_per_dim_ode
from mmdiff.evaluation.patch_grid import patch_grid_ratio
from mmdiff.evaluation.phrases import phrase_accuracy
from mmdiff.evaluation.task import Comparison, Task, mean

LOOKED_AT = 100  # documents that show whether the data has texts and images


class Metric(NamedTuple):
    measure: Callable[[Task], dict[str, float]]
    about: str
    applies: Callable[[Task], bool]
    usual: bool = True  # measured unless metrics are named


def text_bits_per_byte(task: Task) -> dict[str, float]:
    return {"text_bits_per_byte": task.validation["text_bits_per_byte"]}


def x_error(task: Task) -> dict[str, float]:
    return {"x_error": task.validation["x_error"]}


def code_bits(task: Task) -> dict[str, float]:
    """`code_bits`: bits per code, of all codes or (layout.images="masked_code") of those that are masked."""
    return {"code_bits": task.validation["code_bits"]}


def image_bits_per_dim(task: Task) -> dict[str, float]:
    """See mmdiff/sampling/score.py."""
    documents = [task.source[i] for i in range(min(task.count, len(task.source)))]
    scores = task.model.score(documents, seed=task.seed)
    return mean("image_bits_per_dim", [s["image_bits_per_dim"] for s in scores if "image_bits_per_dim" in s])


def evaluate(
    model,
    metrics: Sequence[str] | None = None,
    *,
    source: Source | None = None,
    count: int = 200,
    seed: int = 0,
    phrases: Sequence[Sequence[str]] = (),
    comparison: Comparison = Comparison(),  # noqa: B008  frozen
    **drawing,
) -> dict[str, float]:
    """Measure a model.

    Args:
      model: as `mmdiff.load` returns it.
      metrics: names from METRICS; None takes all that suit the model's data, but for the slow ones, and those of
        `comparison.features` if it is given.
      source: held-out documents, where the model's configuration does not name them.
      count: documents per metric. seed: of everything that is sampled.
      phrases: groups of phrases that captions should name (mmdiff/evaluation/phrases.py); adds phrase_accuracy where no
        metric of phrases is named.
      comparison: how sets of images are compared.
      drawing: sampling options of the images (steps, solver, grid, guidance); the rest are the configuration's.
    Returns:
      numbers by name, in the order of the metrics.
    Raises:
      ConfigError: an unknown metric or option. DataError: there is nothing to measure it on.
    """
    return measure(Task(model, count, seed, drawing, phrases, source, comparison), metrics)


def measure(task: Task, metrics: Sequence[str] | None = None) -> dict[str, float]:
    """`evaluate`, for those who want to know afterwards what it rests on (mmdiff/evaluation/protocol.py)."""
    if task.count < 1:
        raise config.ConfigError(f"count={task.count} must be at least 1.")
    if task.reconstructs:
        config.require(not task.drawing, f"a tokenizer draws nothing: leave out {', '.join(task.drawing)}.")
    else:
        task.model.options(**task.drawing)  # refuses what is wrong with them before anything is measured
    sets.check(task.comparison, metrics or ())
    result: dict[str, float] = {}
    for name in chosen(task, metrics):
        result |= METRICS[name].measure(task)
    return result


def chosen(task: Task, names: Sequence[str] | None) -> list[str]:
    """The metrics to measure: those named, or the usual ones that suit the data and those of the features asked for."""
    named = names is not None and any(name.startswith("phrase_") for name in names)
    added = ["phrase_accuracy"] if task.phrases and not named else []
    if names is None:
        if task.comparison.features is not None:
            added += sets.in_space(task.comparison.features)
        return [name for name, metric in METRICS.items() if metric.usual and metric.applies(task)] + added
    check_names(names)
    for name in names:
        if not METRICS[name].applies(task):
            data = task.model.cfg.data
            raise config.ConfigError(
                f"{name} cannot be measured on data.source={data.source!r}: {METRICS[name].about}; "
                f"choose from {', '.join(n for n, m in METRICS.items() if m.applies(task))}."
            )
    return list(dict.fromkeys([*names, *added]))


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that no metric has."""
    for name in names:
        if name not in METRICS:
            hint = config.suggest(name, list(METRICS)) or f"; choose from {', '.join(METRICS)}."
            raise config.ConfigError(f"unknown metric {name!r}{hint}")


def _generated(generator: str, kind: str) -> Callable[[Task], bool]:
    """Whether the model was trained on this kind of the generator's documents."""
    default = {"shapes": shapes_data.DEFAULT_MIX, "words": words_data.DEFAULT_MIX}[generator]

    def applies(task: Task) -> bool:
        data = task.model.cfg.data
        drawn = kind in ("draw", "edit", "story")
        fit = kind == "draw" if task.reconstructs else not drawn or _draws(task)
        return fit and data.source == generator and dict(data.generator or default).get(kind, 0) > 0

    return applies


def _has_text(task: Task) -> bool:
    """Whether any of the first held-out documents holds a text that the model could read or write."""
    return task.model.cfg.layout.markers and any(isinstance(segment, Text) for segment in _segments(task))


def _has_image(task: Task) -> bool:
    """Whether any of the first held-out documents holds an image that is learnt, for a tokenizer any."""
    return any(isinstance(segment, tuple) and (segment[2] or task.reconstructs) for segment in _segments(task))


def _reconstructs(task: Task) -> bool:
    return task.reconstructs


def _has_both(task: Task) -> bool:
    return _has_text(task) and _makes_images(task)


def _denoises(task: Task) -> bool:
    return not task.reconstructs and task.model.cfg.layout.images == "denoised" and _has_image(task)


def _weighs(task: Task) -> bool:
    """Whether the model knows how likely the pixels of an image are."""
    return _denoises(task) or (not task.reconstructs and task.model.cfg.layout.images == "next_pixel" and _has_image(task))


def _draws(task: Task) -> bool:
    """Whether the model draws images at all."""
    return not task.reconstructs and task.model.cfg.layout.images != "read"


def _makes_images(task: Task) -> bool:
    return task.model.cfg.layout.images != "read" and _has_image(task)


def _weighs_codes(task: Task) -> bool:
    """Whether the model says how likely each code is; "next_vector" says where it should lie."""
    return task.model.cfg.layout.images in ("next_code", "masked_code") and _has_image(task)


def _segments(task: Task) -> Iterator[Text | tuple[int, int, bool]]:
    return itertools.chain.from_iterable(task.source.outline(i) for i in range(min(LOOKED_AT, len(task.source))))


def _grid_shows(task: Task) -> bool:
    return task.model.cfg.model.patch > 1 and _makes_images(task)


def _set_metric(measure: Callable[[Task], dict[str, float]], about: str) -> Metric:
    return Metric(measure, about, _makes_images, usual=False)


METRICS = {
    "caption_accuracy": Metric(shapes.caption_accuracy, "captions of shapes", _generated("shapes", "caption")),
    "image_accuracy": Metric(shapes.image_accuracy, "shapes drawn from captions, or given back", _generated("shapes", "draw")),
    "question_accuracy": Metric(shapes.question_accuracy, "questions about shapes", _generated("shapes", "question")),
    "edit_accuracy": Metric(shapes.edit_accuracy, "edits of shapes", _generated("shapes", "edit")),
    "interleaved_validity": Metric(shapes.interleaved_validity, "stories about shapes", _generated("shapes", "story")),
    "read_accuracy": Metric(words.read_accuracy, "reading words", _generated("words", "read")),
    "write_accuracy": Metric(words.write_accuracy, "words written, or given back", _generated("words", "draw")),
    "probe_accuracy": Metric(probes.probe_accuracy, "questions about fine detail", lambda task: bool(probes.asked(task))),
    "text_bits_per_byte": Metric(text_bits_per_byte, "texts", _has_text),
    "x_error": Metric(
        x_error, "|x_hat - x|^2 / |x|^2 of held-out images denoised at eight fixed noise levels, lower is better", _denoises
    ),
    "patch_grid_ratio": Metric(
        patch_grid_ratio, "steps across patch edges against those inside, generated over real, 1 is best", _grid_shows
    ),
    "image_bits_per_dim": Metric(image_bits_per_dim, "a likelihood bound of images (slow)", _weighs, usual=False),
    "image_bits_per_dim_ode": Metric(
        image_bits_per_dim_ode, "likelihood of images under the sampler's ODE (very slow)", _denoises, usual=False
    ),
    "phrase_accuracy": Metric(phrase_accuracy, "phrases that captions should name", _has_text, usual=False),
    "phrase_drawn": Metric(
        phrases_drawn, "phrases of prompts that a judge, trained on real images, sees in drawings", _has_both, usual=False
    ),
    "code_bits": Metric(code_bits, "what the model finds unlikely about the codes of images", _weighs_codes),
    "psnr": Metric(reconstruction.psnr, "what a tokenizer gives back, decibels", _reconstructs),
    "ssim": Metric(reconstruction.ssim, "the same by local structure, 1 is best", _reconstructs),
    "code_use": Metric(reconstruction.code_use, "how a tokenizer uses its codes", _reconstructs),
    **{
        sets.frechet_name(name): _set_metric(sets.frechet(name), f"Frechet distance of generated and real images: {name}")
        for name in NAMES
    },
    **{f"kid_{name}": _set_metric(sets.kid(name), f"kernel distance of the same, without bias: {name}") for name in NAMES},
    "precision_recall": _set_metric(sets.precision_recall, "shares of either set that lie among the other (--features)"),
    "density_coverage": _set_metric(sets.density_coverage, "the same, less ruled by outliers (--features)"),
    "nearest_train_ratio": _set_metric(
        sets.nearest_train_ratio, "distance to the nearest training image, against held-out images; copies: 0 (--features)"
    ),
}
