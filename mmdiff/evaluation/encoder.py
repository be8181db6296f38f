"""The feature extractor `encoder`: a small network trained here, on the training images of the run, without labels.

It learns two things at once. To tell pictures apart: each of n is cut twice at random, f maps the cuts to h [n, 128] and a
further layer to unit vectors g; of all 2n cuts, the other cut of its own picture must be the most alike. And to tell what
was done to a picture: one of CORRUPTIONS, from h by a linear layer.

    (1) loss = mean_i -log( exp(g_i.g_i' / tau) / sum_{j != i} exp(g_i.g_j / tau) )      over the 2n cuts, i' the other of i's
             + mean_i -log softmax(W h(corrupted_i))[corruption_i]                       over the n pictures
    (2) a cut: a window of 3/4 to 1 of each side, enlarged to the whole; contrast times 0.8..1.2, brightness +- 0.2
    (3) corruptions: none; blurred; noise; two quarters exchanged; every fourth row and column shifted
    (4) features = (h - mean h) / std h, over the training images

Pictures are never mirrored: what (2) varies is what features see less of, and sides are what a picture may have wrong.
f: a linear map of patches (a sixteenth of a side), two 3x3 convolutions of stride 2, relu; then one linear layer.

A minute or so on two cores. The same images and seed give the same network on one machine; another machine may round
differently, so to compare runs let them share a file (`--features encoder --weights FILE`) and compare its hash.

Shapes: pictures float32 [n, side, side, 3] in [-1, 1].
Sources: SimCLR arXiv 2002.05709; why not features of ImageNet alone: Morozov et al., ICLR 2021.
"""

import functools
import io
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff.document import DataError
from mmdiff.evaluation.features import SIDES, Features, batches, convolve, digest, prepared, resizing

WIDTH, PROJECTED, CELLS = 128, 64, 16
CHANNELS = (64, 64, 128)
CORRUPTIONS = ("none", "blurred", "noise", "exchanged", "shifted")
STEPS, PICTURES, TEMPERATURE, LEARNING_RATE, SEED = 400, 64, 0.2, 2e-3, 0
IMAGES = 10_000
"""Training images it learns from, at most."""
ARCHITECTURE = f"encoder patches conv3x3/2 relu {CHANNELS} linear {WIDTH} standardised"
RECIPE = f"{ARCHITECTURE} {CORRUPTIONS} {STEPS} {PICTURES} {TEMPERATURE} {LEARNING_RATE} {SEED} {IMAGES}"
EVERY = 64

Params = dict[str, Any]


def init(side: int, seed: int = SEED) -> Params:
    """Fresh parameters, float32."""
    rng = np.random.default_rng(seed)
    normal = lambda gain, *shape: rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[:-1]))
    first, second, third = CHANNELS
    params = {
        "patch": normal(2, 3 * (side // CELLS) ** 2, first),
        "conv1": normal(2, 3, 3, first, second),
        "conv2": normal(2, 3, 3, second, third),
        "linear": normal(1, 16 * third, WIDTH),
        "project": normal(1, WIDTH, PROJECTED),
        "classify": np.zeros((WIDTH, len(CORRUPTIONS))),
    } | {f"bias{i}": np.zeros(width) for i, width in enumerate(CHANNELS)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def encode(params: Params, x: jax.Array) -> jax.Array:
    """f: pictures to [n, WIDTH], not yet standardised."""
    exact = jax.lax.Precision.HIGHEST
    patches = einops.rearrange(x, "n (i p) (j q) c -> n i j (p q c)", i=CELLS, j=CELLS)
    x = jax.nn.relu(jnp.matmul(patches, params["patch"], precision=exact) + params["bias0"])
    x = jax.nn.relu(convolve(x, params["conv1"], 2) + params["bias1"])
    x = jax.nn.relu(convolve(x, params["conv2"], 2) + params["bias2"])
    return jnp.matmul(x.reshape(len(x), -1), params["linear"], precision=exact)


def cut(key: jax.Array, x: jax.Array) -> jax.Array:
    """Equation (2) for each picture."""
    count, side = x.shape[:2]
    keys = jax.random.split(key, 4)
    scale = jax.random.uniform(keys[0], (2, count, 1), minval=0.75, maxval=1.0)
    start = jax.random.uniform(keys[1], (2, count, 1)) * side * (1 - scale)
    places = jnp.clip(start + (jnp.arange(side) + 0.5) * scale - 0.5, 0, side - 1)
    rows, cols = jax.nn.relu(1 - jnp.abs(places[..., None] - jnp.arange(side)))
    x = jnp.einsum("nih,nhwc,njw->nijc", rows, x, cols)
    contrast = jax.random.uniform(keys[2], (count, 1, 1, 1), minval=0.8, maxval=1.2)
    brightness = jax.random.uniform(keys[3], (count, 1, 1, 1), minval=-0.2, maxval=0.2)
    return x * contrast + brightness


def corrupt(key: jax.Array, x: jax.Array, kind: jax.Array) -> jax.Array:
    """Equation (3): `kind` [n] numbers CORRUPTIONS."""
    side = x.shape[1]
    half, rows, cols = side // 2, jnp.arange(side)[:, None, None], jnp.arange(side)[:, None]
    near = lambda a, axis: (jnp.roll(a, 1, axis) + 2 * a + jnp.roll(a, -1, axis)) / 4
    quarters = ((rows < half) & (cols < half)) | ((rows >= half) & (cols >= half))
    lines = (rows % 4 == 0) | (cols % 4 == 0)
    made = (
        x,
        near(near(x, 1), 2),
        x + 0.1 * jax.random.normal(key, x.shape),
        jnp.where(quarters, x, jnp.roll(x, 1, axis=0)),
        jnp.where(lines, jnp.roll(x, (1, 1), axis=(1, 2)), x),
    )
    return jnp.select([kind[:, None, None, None] == i for i in range(len(made))], made)


def loss_of(params: Params, key: jax.Array, x: jax.Array) -> jax.Array:
    """Equation (1)."""
    count, keys = len(x), jax.random.split(key, 4)
    kind = jax.random.randint(keys[2], (count,), 0, len(CORRUPTIONS))
    h = encode(params, jnp.concatenate([cut(keys[0], x), cut(keys[1], x), corrupt(keys[3], x, kind)]))
    g = jax.nn.relu(h[: 2 * count]) @ params["project"]
    g = g / jnp.linalg.norm(g + 1e-6, axis=-1, keepdims=True)
    alike = g @ g.T / TEMPERATURE - 1e9 * jnp.eye(2 * count)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    other = jnp.roll(jnp.arange(2 * count), count)
    return entropy(alike, other).mean() + entropy(h[2 * count :] @ params["classify"], kind).mean()


@functools.partial(jax.jit, static_argnames="steps")
def _step(params: Params, state, number, images: jax.Array, steps: int):
    x = images.astype(jnp.float32) / 127.5 - 1
    loss, grads = jax.value_and_grad(loss_of)(params, jax.random.fold_in(jax.random.key(SEED), number), x)
    updates, state = _optimizer(steps).update(grads, state)
    return optax.apply_updates(params, updates), state, loss


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


def train(images: Iterable[np.ndarray], side: int, steps: int = STEPS, together: int = PICTURES) -> tuple[Params, list[float]]:
    """Train on uint8 pictures of any sizes, `together` of them in each step.

    Returns:
      the parameters, and the loss of every step.
    Raises:
      DataError: fewer than two pictures cannot be told apart.
    """
    shrink = jax.jit(lambda x: jnp.rint((prepared(x, side) + 1) * 127.5).astype(jnp.uint8))
    small = [np.asarray(shrink(batch)) for batch in batches(images, EVERY)]
    if sum(map(len, small)) < 2:
        raise DataError(
            f"features 'encoder' learn from training images, of which there are {sum(map(len, small))}; use others."
        )
    pictures = np.concatenate(small)
    rng, params = np.random.default_rng(SEED), init(side)
    state, losses = _optimizer(steps).init(params), []
    for number in range(steps):
        chosen = rng.choice(len(pictures), min(together, len(pictures)), replace=False)
        params, state, loss = _step(params, state, number, pictures[chosen], steps)
        losses.append(loss)
    run = jax.jit(lambda x: encode(params, x.astype(jnp.float32) / 127.5 - 1))
    h = np.concatenate([np.asarray(run(pictures[i : i + EVERY])) for i in range(0, len(pictures), EVERY)])
    params = {name: value for name, value in params.items() if name not in ("project", "classify")}
    params |= {"mean": h.mean(0), "std": h.std(0) + 1e-6}
    return params, [float(loss) for loss in losses]


def features(params: Params, side: int) -> Features:
    """The extractor of trained parameters."""
    embed = jax.jit(lambda images: (encode(params, prepared(images, side)) - params["mean"]) / params["std"])
    arrays = {name: np.asarray(value) for name, value in params.items()}
    return Features("encoder", WIDTH, resizing(side), digest(f"{ARCHITECTURE} side {side}", arrays), embed)


def save(params: Params, side: int, path: Path) -> None:
    """Write an encoder; a kill leaves nothing or all of it."""
    write(path, side=side, **params)


def load(path: Path) -> Features:
    """The extractor that `save` wrote.

    Raises:
      DataError: no such file, or it holds no encoder.
    """
    params, side = read(path, "encoder that `mmdiff evaluate` wrote", "remove it to train anew")
    wanted = {name: value.shape for name, value in init(side).items() if name not in ("project", "classify")}
    wanted |= {"mean": (WIDTH,), "std": (WIDTH,)}
    if {name: value.shape for name, value in params.items()} != wanted:
        raise DataError(f"{path} holds another network than this version's encoder; remove it to train anew.")
    return features(params, side)


def write(path: Path, **arrays: Any) -> None:
    """Write arrays; a kill leaves nothing or all of them."""
    from mmdiff.training.workdir import write_whole

    data = io.BytesIO()
    given: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(data, **given)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())


def read(path: Path, what: str, remedy: str) -> tuple[Params, int]:
    """Arrays that `write` wrote, and their `side`.

    Raises:
      DataError: no such file, or it holds no `what`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            params, side = {name: file[name] for name in file.files if name != "side"}, int(file["side"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no {what} ({error}); {remedy}.") from error
    if side not in SIDES:
        raise DataError(f"{path}: side {side} is none of {SIDES}; {remedy}.")
    return params, side


def trained(images: Iterable[np.ndarray], side: int, cached: Path | None, steps: int = STEPS) -> Features:
    """The encoder in the file `cached`, or one trained now and written there (if a path is given)."""
    if cached is not None and cached.is_file():
        return load(cached)
    kept = f"kept in {cached}" if cached is not None else "not kept"
    print(f"features: training the encoder on the training images, a minute or so ({kept})", file=sys.stderr)
    params, _ = train(images, side, steps)
    if cached is not None:
        try:
            save(params, side, cached)
        except OSError as error:
            print(f"warning: {cached} could not be written ({error.strerror}); the encoder is not kept.", file=sys.stderr)
    return features(params, side)
