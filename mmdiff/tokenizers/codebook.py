"""Operations on a codebook of V codes: who is nearest, what was used, and which vectors may replace a dead code.

    (1) nearest(z) = argmin_v |z - c_v|^2 = argmin_v (|c_v|^2 / 2 - z . c_v)         ties: the smallest v
    (2) n_v = sum of weights over the positions with id v          (3) m_v = weighted sum of their vectors
    (4) H = -sum_v p_v log2 p_v with p_v = n_v / sum n              perplexity = 2^H

(1) goes through the codes in chunks and remembers the best so far, so that the [N, V] distances never exist; in true
float32, because the bf16 or TF32 products that accelerators take by default change several per cent of the ids. (2) and
(3) are scatter-adds for the same reason: no one-hot [N, V] matrix.

Everything is written for the whole (global) batch: under jit XLA adds up over the devices that share it.

Shapes: z [..., d], codes [V, d], ids int32 [...], weight float [...], 1 where a position counts and 0 where it does not.
"""

import jax
import jax.numpy as jnp

CHUNK = 1024  # codes per step of the search: memory is N * CHUNK floats
EPS = 1e-6


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), EPS**2))


def nearest(z: jax.Array, codes: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Id of the code nearest to each vector, (1); no gradient.

    Args:
      z: [..., d], any float type; what follows is float32.
      codes: [V, d].
      chunk: codes compared at a time.
    Returns:
      int32 [...].
    """
    z, codes = (jax.lax.stop_gradient(jnp.asarray(a, jnp.float32)) for a in (z, codes))
    size, width = codes.shape
    chunk = min(chunk, size)
    missing = -size % chunk
    half_square = jnp.pad(jnp.square(codes).sum(-1) / 2, (0, missing), constant_values=jnp.inf)  # fillers are never nearest
    chunks = jnp.pad(codes, ((0, missing), (0, 0))).reshape(-1, chunk, width), half_square.reshape(-1, chunk)

    def compare(best, piece):
        distance, ids = best
        part, half, start = piece
        scores = half - jnp.einsum("...d,vd->...v", z, part, precision=jax.lax.Precision.HIGHEST)
        least = scores.min(-1)
        closer = least < distance  # not <=: an earlier chunk keeps a tie
        return (jnp.where(closer, least, distance), jnp.where(closer, start + scores.argmin(-1), ids)), None

    furthest = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
    starts = jnp.arange(0, size, chunk, dtype=jnp.int32)
    return jax.lax.scan(compare, furthest, (*chunks, starts))[0][1]


def counts(ids: jax.Array, size: int, weight: jax.Array | None = None) -> jax.Array:
    """How often each code occurs, (2): float32 [size]; exact up to 2^24 of one code."""
    weight = jnp.ones(ids.shape) if weight is None else jnp.asarray(weight, jnp.float32)
    return jax.ops.segment_sum(weight.reshape(-1), ids.reshape(-1), num_segments=size)


def sums(z: jax.Array, ids: jax.Array, size: int, weight: jax.Array | None = None) -> jax.Array:
    """Sum of the vectors of each code, (3): float32 [size, d]."""
    z = jnp.asarray(z, jnp.float32) if weight is None else z * jnp.asarray(weight, jnp.float32)[..., None]
    return jax.ops.segment_sum(z.reshape(-1, z.shape[-1]), ids.reshape(-1), num_segments=size)


def donors(key: jax.Array, dead: jax.Array, z: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Vectors of the batch that replace dead codes: drawn at random among those that count, none of them twice.

    Two codes with one donor would be a tie that the second never wins, so dead codes beyond the number of vectors wait.

    Args:
      key: the same on all devices.
      dead: bool [V].
      z, weight: [..., d] and [...], the whole batch.
    Returns:
      float32 [V, d], one donor per dead code, and bool [V], the codes that got one.
    """
    z = z.reshape(-1, z.shape[-1])
    weight = jnp.ones(len(z)) if weight is None else weight.reshape(-1)
    drawn = jnp.argsort(jnp.where(weight > 0, jax.random.uniform(key, weight.shape), jnp.inf))  # those that count come first
    turn = jnp.cumsum(dead) - 1
    return z[drawn[jnp.clip(turn, 0, len(z) - 1)]], dead & (turn < (weight > 0).sum())


def usage(count: jax.Array) -> jax.Array:
    """Share of the codes that occur at all."""
    return (count > 0).mean()


def entropy_bits(count: jax.Array) -> jax.Array:
    """Unigram entropy of the ids in bits, (4): at most log2 V; 0 where nothing was counted."""
    p = count / jnp.maximum(count.sum(), 1)
    return jax.scipy.special.entr(p).sum() / jnp.log(2.0)


def perplexity(count: jax.Array) -> jax.Array:
    """The number of equally frequent codes with the same entropy, (4)."""
    return jnp.exp2(entropy_bits(count))
