"""The update rule and its learning rate.

    (1) g <- g min(1, clip / |g|)                                 |.| the global L2 norm
    (2) u  = m / (sqrt(v) + eps)                                  Adam, bias-corrected
        u  = 0.2 sqrt(max(in, out)) orthogonal(m)                 Muon, hidden matrices only; Adam for all else
    (3) u <- u + weight_decay p                                   kernels only, see `decay_mask`
    (4) u <- u |p| / |u|                                          LAMB only; not for norms and biases
    (5) p <- p - lr(t) u

Parameters are nested dicts. A leaf below a key `blocks` is stacked along a leading layer axis ([layers, ...]); no rule
mixes layers: matrices are orthogonalised and trust ratios are taken layer by layer. Matrices are leaves `kernel`.

Sources: LAMB arXiv:1904.00962, with the trust ratio as in bert4keras; Muon arXiv:2502.16982 (the factor 0.2 sqrt(max)
gives every matrix an update of root mean square about 0.2, what Adam's is, so that one learning rate serves both).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mmdiff import config

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2


def make_optimizer(settings: config.Optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The transformation and, for logging, its learning rate as a function of the number of updates applied.

    `b1`, `b2` and `eps` are Adam's; Muon's momentum is 0.95. The stages are named, so that the leaves of the optimiser
    state keep their names in checkpoints whichever stages are on.
    """
    schedule = make_schedule(settings, steps)
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps)
    stages: list[tuple[str, optax.GradientTransformation]] = []
    if settings.clip > 0:
        stages.append(("clip", optax.clip_by_global_norm(settings.clip)))
    if settings.name == "muon":
        stages.append(("muon", optax.partition({"muon": _orthogonalise(), "adam": adam}, muon_labels)))
    else:
        stages.append(("adam", adam))
    if settings.weight_decay > 0:
        stages.append(("decay", optax.add_decayed_weights(settings.weight_decay, decay_mask)))
    if settings.name == "lamb":
        stages.append(("trust_ratio", scale_by_layer_trust_ratio()))
    stages.append(("learning_rate", optax.scale_by_learning_rate(schedule)))
    return optax.named_chain(*stages), schedule


def make_schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of update t = 0, 1, ...: (t + 1) / warmup of the peak, then down to `final` at t = `steps`.

    Neither the first nor the last update is wasted on a rate of zero, unless `points` say so.
    """
    peak, warmup, final = settings.learning_rate, settings.warmup, settings.final
    if settings.decay == "points":
        at, factor = (jnp.asarray(column, jnp.float32) for column in zip(*settings.points, strict=True))
        return lambda t: peak * jnp.interp(jnp.asarray(t, jnp.float32), at, factor)

    def schedule(t):
        t = jnp.asarray(t, jnp.float32)
        rise = jnp.minimum((t + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if settings.decay == "cosine":
            shape = (1 + jnp.cos(jnp.pi * done)) / 2
        elif settings.decay == "linear":
            shape = 1 - done
        else:
            return peak * rise
        return peak * rise * (final + (1 - final) * shape)

    return schedule


def decay_mask(params: Any) -> Any:
    """True where weight decay acts: leaves `kernel` that are matrices within one layer, outside embeddings.

    Norm scales, biases, embeddings and the scales and offsets of shared heads ([layers, 2, width]) are never decayed.
    """

    def decays(path, leaf):
        names = _names(path)
        return names[-1] == "kernel" and _rank(names, leaf) >= 2 and not any("embedding" in n for n in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_labels(params: Any) -> Any:
    """'muon' for hidden matrices, the leaves `blocks/.../kernel` of shape [layers, in, out] or [layers, in, n, out] (n
    matrices side by side, each orthogonalised by itself); 'adam' for the rest: heads, embeddings, norms, biases.
    """

    def label(path, leaf):
        names = _names(path)
        return "muon" if "blocks" in names and names[-1] == "kernel" and leaf.ndim in (3, 4) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def adapts(path: tuple, leaf: jax.Array) -> bool:
    """Whether LAMB rescales this leaf: not if a name on its path contains `norm` or `bias`."""
    del leaf
    return not any("norm" in name or "bias" in name for name in _names(path))


def scale_by_layer_trust_ratio() -> optax.GradientTransformation:
    """u <- u |p| / |u|, per layer for stacked leaves; a ratio with a norm of zero above or below the line is 1.

    The ratio belongs to a weight of the published unit, however it is stored here: W_gates and W_shared of a GAU are one
    matrix there and share theirs; scales and shifts of queries and keys are two vectors each and have their own.
    """

    def squares(path, x):
        """Sum of squares, over all but the layer axis and what belongs to different weights."""
        first = ("blocks" in _names(path)) + (_names(path)[-1] in ("scale_qk", "shift_qk"))
        return jnp.sum(jnp.square(x), tuple(range(first, x.ndim)), keepdims=True)

    def update(updates, state, params=None):
        sums = {
            tuple(_names(path)): (squares(path, u), squares(path, p))
            for (path, u), p in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True)
        }

        def scale(path, u, p):
            if not adapts(path, p):
                return u
            names = tuple(_names(path))
            square_u, square_p = sums[names]
            partner = {"gates": "shared", "shared": "gates"}.get(names[-2]) if len(names) > 1 else None
            if partner is not None and (*names[:-2], partner, names[-1]) in sums:
                other_u, other_p = (a.reshape(-1, *[1] * (u.ndim - 1)) for a in sums[(*names[:-2], partner, names[-1])])
                square_u, square_p = square_u + other_u, square_p + other_p
            norm_u, norm_p = jnp.sqrt(square_u), jnp.sqrt(square_p)
            usable = (norm_p > 0) & (norm_u > 0)
            return u * jnp.where(usable, norm_p / jnp.where(usable, norm_u, 1.0), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _orthogonalise() -> optax.GradientTransformation:
    """Muon for leaves [layers, in, (n,) out]: Nesterov momentum, then Newton-Schulz per matrix, then equation (2)."""

    def numbers(leaf):  # axes that are not named are batch axes
        return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=leaf.ndim - 1)

    direction = contrib.scale_by_muon(
        beta=MUON_MOMENTUM, weight_dimension_numbers=lambda updates: jax.tree.map(numbers, updates)
    )

    def equal_rms(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: MUON_RMS * max(u.shape[1], u.shape[-1]) ** 0.5 * u, updates), state

    return optax.chain(direction, optax.GradientTransformation(lambda params: optax.EmptyState(), equal_rms))


def _names(path: tuple) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _rank(names: list[str], leaf: jax.Array) -> int:
    return leaf.ndim - ("blocks" in names)
