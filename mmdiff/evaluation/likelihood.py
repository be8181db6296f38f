"""The likelihood of images under the probability-flow ODE: what a model's own deterministic sampler assigns to them.

In the coordinate X = x + sigma eps with l = log sigma and D = denoise(X, sigma) in d values, the ODE and the change of
log density along it are

    (1) dX/dl = X - D                              from X(l_min) = x at sigma_min to sigma_max
    (2) d log p(X) / dl = -tr d(X - D)/dX = -d + tr dD/dX
    (3) log p(x) = log N(X(l_max); 0, sigma_max^2 I) + d (l_max - l_min) - int tr dD/dX dl
                 = -d/2 log 2 pi - d log sigma_min - |X(l_max)|^2 / (2 sigma_max^2) - int tr dD/dX dl

(3) is exact for the flow of any D, trained well or not: it is the density of what the ODE makes of noise of size
sigma_max, stopped at sigma_min. Nothing limits it from below: a network that is poor at little noise pays for its
certainty there. Where to stop is therefore part of the model, as in score.py: an even mixture over K stops, for which

    (4) -log p(x) <= min over stops of (3) + log K

The first stop and sigma_max are those of the configuration (`sampling`), so of what the model samples; the others are 3
and 10 times as high. Integrated is Z = X / s, s = sqrt(1 + sigma^2), which keeps its size,

    (5) dZ/dl = Z / (1 + sigma^2) - D / s

by Runge-Kutta 4 in equal steps of l. The trace is that of one product with the Jacobian for each of m probes r of random
signs, the same along the whole way, whose mean has no bias (Hutchinson); or, for small d, of all d of them:

    (6) tr dD/dX ~ mean_r r.(dD/dX) r

Images are whole levels; the density is that of x + (U - 1/2) / 127.5, U uniform in [0, 1), so that its bits per dimension
bound those of the levels from above:

    (7) bits = -log p / (d log 2) + log2 127.5          (uniform noise in [-1, 1]: 8 bits)

Shapes: X [b, ...], one density per row; the rest as in mmdiff/sampling/score.py.
Sources: Song et al. arXiv 2011.13456, section 4.3; Grathwohl et al. arXiv 1810.01367; uniform dequantisation arXiv 1511.01844.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.diffusion import prediction
from mmdiff.diffusion.schedule import time_of
from mmdiff.document import Document
from mmdiff.evaluation.task import Task, mean
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.sampling.score import GROUP, rows_of
from mmdiff.sampling.session import fold
from mmdiff.training.loss import corrupt, normalise

STEPS, PROBES = 32, 1
STOPS = (1.0, 3.0, 10.0)
"""In units of sampling.sigma_min."""


def ode_nats(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    probes: jax.Array | None = None,
    *,
    sigma_min: float | jax.Array,
    sigma_max: float | jax.Array,
    counted: jax.Array | None = None,
    steps: int = STEPS,
) -> jax.Array:
    """-log p(x) of equation (3), in nats.

    Args:
      denoise: (X [b, ...], sigma []) to x_hat [b, ...]; each row must depend on itself only.
      x: [b, ...], float32 or wider.
      probes: random signs [m, b, ...]; None: the exact trace, by as many products as a row of x has values.
      counted: bool like x, the values that are random; the rest are 0 in X and not counted.
    Returns:
      [b]
    """
    axes = tuple(range(1, x.ndim))
    counted = jnp.ones(x.shape, bool) if counted is None else counted
    only = lambda a: jnp.where(counted, a, 0.0)
    exact, count = probes is None, math.prod(x.shape[1:])
    if probes is None:
        basis = jnp.eye(count, dtype=x.dtype).reshape(count, 1, *x.shape[1:])
        probes = jnp.broadcast_to(basis, (count, *x.shape))
    probes = only(probes.astype(x.dtype))

    def slope(z: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Equation (5), and the trace (6)."""
        sigma = jnp.exp(level)
        s = jnp.sqrt(1 + sigma**2)
        x_hat, product = jax.linearize(lambda point: only(denoise(point, sigma)), z * s)
        traces = jax.lax.map(lambda r: jnp.sum(r * product(r), axes), probes)
        return z / s**2 - x_hat / s, traces.sum(0) if exact else traces.mean(0)

    low, high = jnp.log(jnp.asarray(sigma_min, x.dtype)), jnp.log(jnp.asarray(sigma_max, x.dtype))
    h = (high - low) / steps

    def step(carry, level):
        z, total = carry
        z1, t1 = slope(z, level)
        z2, t2 = slope(z + h / 2 * z1, level + h / 2)
        z3, t3 = slope(z + h / 2 * z2, level + h / 2)
        z4, t4 = slope(z + h * z3, level + h)
        return (z + h / 6 * (z1 + 2 * z2 + 2 * z3 + z4), total + h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)), None

    start = only(x) / jnp.sqrt(1 + jnp.exp(2 * low)), jnp.zeros(len(x), x.dtype)
    (z, total), _ = jax.lax.scan(step, start, low + h * jnp.arange(steps))
    prior = jnp.sum(z**2, axes) * (1 + sigma_max**2) / (2 * sigma_max**2)
    return counted.sum(axes) * (0.5 * math.log(2 * math.pi) + low) + prior + total


def bits_per_dim(nats: float, values: int) -> float:
    """Equation (7)."""
    return nats / values / math.log(2) + math.log2(127.5)


def image_bits_per_dim_ode(task: Task) -> dict[str, float]:
    """`image_bits_per_dim_ode`: (4), and `image_bits_per_dim_ode_<sigma>`: (3) for each stop; means over the held-out
    documents with images, of all images of each, given what stands before them."""
    documents = [task.source[i] for i in range(min(task.count, len(task.source)))]
    documents = [document for document in documents if document.images]
    sampling = task.model.cfg.sampling
    stops = [stop * sampling.sigma_min for stop in STOPS if stop * sampling.sigma_min < sampling.sigma_max]
    task.notes["ode"] = {
        "solver": "rk4 in log sigma",
        "steps": STEPS,
        "probes": PROBES,
        "stops": stops,
        "sigma_max": sampling.sigma_max,
        "dequantisation": "uniform",
        "documents": len(documents),
    }
    parts: list[list[DocumentNats]] = []
    for stop in stops:
        found: list[DocumentNats] = []
        for start in range(0, len(documents), GROUP):
            found += document_nats(task.model, documents[start : start + GROUP], stop, seed=task.seed, first=start)
        parts.append(found)
    best = [min(d.nats for d in same) + math.log(len(stops)) for same in zip(*parts, strict=True)]
    name = "image_bits_per_dim_ode"
    result = mean(name, [bits_per_dim(nats, d.values) for nats, d in zip(best, parts[0], strict=True)])
    for stop, found in zip(stops, parts, strict=True):
        result |= mean(f"{name}_{stop:g}", [bits_per_dim(d.nats, d.values) for d in found])
    return result


class DocumentNats(NamedTuple):
    nats: float  # of all its images together
    values: int  # that they have


def document_nats(
    model, documents: list[Document], sigma_min: float, *, seed: int = 0, first: int = 0, steps: int = STEPS
) -> list[DocumentNats]:
    """-log p of the images of each document, stopped at sigma_min; at most as many documents as one call takes.

    Random numbers come from the seed, a document's number (they are numbered from `first`) and those of its patches, and
    do not depend on what else is in the batch. The network runs in float32 with the dense form of attention, which alone
    can be differentiated forwards.
    """
    rows = rows_of(model, documents)
    exact = dataclasses.replace(model.network.cfg, attention="dense", compute="float32")
    network = dataclasses.replace(model.network, cfg=exact)
    keys = fold(jnp.broadcast_to(jax.random.key(seed), len(rows.tokens)), first + np.arange(len(rows.tokens)))
    ends = np.float32(sigma_min), np.float32(model.cfg.sampling.sigma_max)
    nats = np.asarray(_rows_nats(network, model.cfg.diffusion, steps, model.params, rows, keys, ends), np.float64)
    values = 3 * model.cfg.model.patch**2 * np.sum(rows.noised & rows.is_patch, axis=1)
    return [DocumentNats(float(nats[i]), int(values[i])) for i in range(len(documents))]


@functools.partial(jax.jit, static_argnames=("network", "diffusion", "steps"))
def _rows_nats(
    network: Network,
    diffusion: config.Diffusion,
    steps: int,
    params: Any,
    rows: Rows,
    keys: jax.Array,
    ends: tuple[Any, Any],
) -> jax.Array:
    """-log density of the noised blocks of each row, [b]: all of a row together, since none reads another.

    `ends`: sigma_min and sigma_max; `keys` [b].
    """
    model, clean = network.bind(params), normalise(rows.patches)
    noised = (rows.noised & rows.is_patch)[..., None]
    rank = jnp.cumsum(noised[..., 0], axis=1)  # number of a noised patch in its row, wherever it stands
    by_patch = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, rank)
    both = jax.vmap(jax.vmap(jax.random.split))(by_patch)
    values = clean.shape[-1:]
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, values)))(both[..., 0])
    probes = jax.vmap(jax.vmap(lambda key: jax.random.rademacher(key, (PROBES, *values))))(both[..., 1])
    x = clean + (uniform - 0.5) / 127.5

    def denoise(point: jax.Array, sigma: jax.Array) -> jax.Array:
        u = jnp.where(rows.noised, time_of(sigma), 0.0)
        _, alpha, scale = corrupt(clean, clean, u, diffusion)
        z = jnp.where(noised, alpha * point, alpha * clean)
        hidden = model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
        output = model.predict(hidden, rows.cell)
        return prediction.convert(output, z, alpha, scale, source=diffusion.prediction, target="x", clip=1e-4)

    counted = jnp.broadcast_to(noised, x.shape)
    first, last = ends
    return ode_nats(denoise, x, jnp.moveaxis(probes, 2, 0), sigma_min=first, sigma_max=last, counted=counted, steps=steps)
