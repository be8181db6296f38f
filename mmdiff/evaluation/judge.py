"""Whether drawings show what their prompts say, where no exact reader exists: a judge that has learnt it from real images.

A small network learns on the training images of the run which phrase of each group (mmdiff/evaluation/phrases.py) the text
of an image has; "none of them" is a class too. It then looks at drawings, and at the real images of the same prompts:
what it scores there is the most that drawings can be asked for.

    (1) loss = sum over groups g of mean_i -log softmax(W_g f(cut_i))[class of text i in g]

f and the cuts are those of the feature extractor mmdiff/evaluation/encoder.py, trained here from the start. The judge never
sees a drawing while it learns and shares nothing with the model that draws; a drawing that fools it is still wrong, so
compare numbers of one judge with each other. A minute or two on two cores; another number of cores may round differently.
`--judge FILE` takes one that was trained before, so that runs are judged alike (experiments/stand_ins/attribute_classifier.py).
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff.config import ConfigError
from mmdiff.data.sources import open_source
from mmdiff.document import DataError
from mmdiff.evaluation import encoder, prompts
from mmdiff.evaluation.features import batches, digest, prepared, side_for
from mmdiff.evaluation.phrases import classes, means, name_of
from mmdiff.evaluation.task import Task

STEPS, PICTURES, LEARNING_RATE, DROPPED, SEED = 1500, 64, 2e-3, 0.3, 0
IMAGES = 20_000
"""Training images it learns from, at most."""
EVERY = 64


class Judge(NamedTuple):
    """Calling it on images uint8 [h, w, 3] gives their classes int [n, groups], as those of texts."""

    groups: Sequence[Sequence[str]]
    side: int
    params: encoder.Params

    def __call__(self, asked: Sequence[np.ndarray]) -> np.ndarray:
        small = _small(asked, self.side)
        filled = np.concatenate([small, np.repeat(small[:1], -len(small) % EVERY, axis=0)])  # one program
        found = [np.asarray(_seen(self.params, filled[i : i + EVERY])) for i in range(0, len(filled), EVERY)]
        return np.concatenate(found)[: len(small)]

    @property
    def digest(self) -> str:
        """Hash of what it asks and what it has learnt: numbers are comparable where hashes are equal."""
        arrays = {name: np.asarray(value) for name, value in self.params.items()}
        return digest(f"{encoder.ARCHITECTURE} side {self.side} {json.dumps(self.groups)}", arrays)

    def save(self, path: Path) -> None:
        """Write it; a kill leaves nothing or all of it."""
        encoder.write(path, side=self.side, groups=json.dumps(self.groups), **self.params)


def phrases_drawn(task: Task) -> dict[str, float]:
    """`phrase_drawn` and `phrase_drawn_<group>`: drawings judged to show what their prompts say; `phrase_judge...`: the
    same of the real images of these prompts."""
    if not task.phrases:
        raise ConfigError("phrase_drawn needs phrases, for example --phrases 'black hair|brown hair;smiling'.")
    told = classes(["".join(drawing.prompt.texts) for drawing in task.wanted], task.phrases)
    judge = task.once("judge", lambda: _judge_of(task))
    task.notes["judge"] = judge.digest
    real = task.once("real judged", lambda: judge([drawing.image.pixels for drawing in task.wanted]))
    return means("phrase_drawn", judge(task.generated) == told, task.phrases) | means(
        "phrase_judge", real == told, task.phrases
    )


def _judge_of(task: Task) -> Judge:
    """A judge trained on the training split of the run."""
    found = prompts.pictures(open_source(task.model.cfg, "train"), task.model.cfg, IMAGES)
    print(f"phrase_drawn: training a judge on {len(found)} training images, a minute or two", file=sys.stderr)
    return train([image.pixels for image, _ in found], [text for _, text in found], task.phrases)


def train(images: Sequence[np.ndarray], texts: Sequence[str], groups: Sequence[Sequence[str]], *, steps: int = STEPS) -> Judge:
    """Learn the classes of `texts` from `images` (uint8 [h, w, 3] of any sizes, one for each text).

    Raises:
      DataError: no images, or a group of which all texts have the same class.
    """
    if not images:
        raise DataError("phrase_drawn learns from training images that have texts, of which there are none.")
    told = classes(texts, groups)
    for group, column in zip(groups, told.T, strict=True):
        if (column == column[0]).all():
            raise DataError(f"phrase_drawn: the training texts do not differ in {name_of(group)!r}; leave this group out.")
    side = side_for(images)
    pictures, params = _small(images, side), _fresh(side, groups)
    state, rng = _optimizer(steps).init(params), np.random.default_rng(SEED)
    for number in range(steps):
        chosen = rng.choice(len(pictures), min(PICTURES, len(pictures)), replace=False)
        params, state = _step(params, state, number, pictures[chosen], told[chosen], steps)
    return Judge(groups, side, params)


def load(path: Path) -> Judge:
    """The judge that `Judge.save` wrote.

    Raises:
      DataError: no such file, or it holds no judge.
    """
    remedy = "give a file of experiments/stand_ins/attribute_classifier.py"
    params, side = encoder.read(path, "judge of drawings", remedy)
    try:
        groups = json.loads(str(params.pop("groups")))
        wanted = _fresh(side, groups)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} holds no judge of drawings ({error!r}); {remedy}.") from error
    if {name: value.shape for name, value in params.items()} != {name: value.shape for name, value in wanted.items()}:
        raise DataError(f"{path} holds another network than this version's judge; {remedy}.")
    return Judge(groups, side, params)


def _fresh(side: int, groups: Sequence[Sequence[str]]) -> encoder.Params:
    params = {key: value for key, value in encoder.init(side, SEED).items() if key not in ("project", "classify")}
    heads: dict[str, Any] = {f"head{g}": jnp.zeros((encoder.WIDTH, len(group) + 1)) for g, group in enumerate(groups)}
    return params | heads | {f"head_bias{g}": jnp.zeros(len(group) + 1) for g, group in enumerate(groups)}


def _small(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """uint8 [n, side, side, 3]."""
    shrink = jax.jit(lambda x: jnp.rint((prepared(x, side) + 1) * 127.5).astype(jnp.uint8))
    return np.concatenate([np.asarray(shrink(batch)) for batch in batches(images, EVERY)])


def _scaled(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) / 127.5 - 1


@jax.jit
def _seen(params: encoder.Params, images: jax.Array) -> jax.Array:
    return jnp.stack([scores.argmax(-1) for scores in _scores(params, _scaled(images))], -1)


def _scores(params: encoder.Params, x: jax.Array, kept: jax.Array | float = 1.0) -> list[jax.Array]:
    """Logits [n, classes] of each group. `kept` [n, width]: 0 where a feature is dropped."""
    h = jax.nn.relu(encoder.encode(params, x)) * kept
    return [h @ params[f"head{g}"] + params[f"head_bias{g}"] for g in range(sum(key.startswith("head_bias") for key in params))]


@functools.partial(jax.jit, static_argnames="steps")
def _step(params: encoder.Params, state, number, images: jax.Array, told: jax.Array, steps: int):
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(SEED), number))
    kept = jax.random.bernoulli(second, 1 - DROPPED, (len(images), encoder.WIDTH)) / (1 - DROPPED)

    def loss(params):
        scores = _scores(params, encoder.cut(first, _scaled(images)), kept)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return jnp.stack([entropy(s, told[:, g]).mean() for g, s in enumerate(scores)]).sum()

    updates, state = _optimizer(steps).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=0.05)
