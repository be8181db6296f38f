"""Layers and blocks against independent NumPy versions, and the lossless patch projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.config import Model
from mmdiff.layout import IntervalMask, patch_cells
from mmdiff.models.patches import RawPatches
from mmdiff.nn.around import TIME_WIDTH, Around
from mmdiff.nn.gau import GatedAttentionUnit
from mmdiff.nn.layers import Linear, RMSNorm
from mmdiff.nn.rope import rotation
from mmdiff.nn.transformer_block import TransformerBlock
from mmdiff.training.loss import normalise

TOLERANCE = 2e-5
B, T = 2, 11


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def swish(x):
    return x / (1 + np.exp(-x))


def turn(x, position, p, cfg, head=0):
    """2-D RoPE by complex numbers: x [b, t, c], position [b, t, 2]."""
    half = x.shape[-1] // 2
    if cfg.rope == "none":
        return x
    if cfg.rope == "mixed":
        angle = position @ p["turn"]["frequencies"][head].T
    else:
        frequencies = cfg.rope_base ** (-np.arange(half // 2) / (half // 2))
        angle = np.concatenate([position[..., :1] * frequencies, position[..., 1:] * frequencies], -1)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], -1)


def mix(q, k, v, allowed, scale):
    scores = np.where(allowed, scale * q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def dense(p, h, *part):
    """h W + b, of one of several matrices side by side if `part` says which."""
    return h @ p["kernel"][(slice(None), *part)] + (p["bias"][part] if "bias" in p else 0)


def modulations(p, time, count):
    """Scale, shift and gate of each branch; without effect where the layer has none."""
    if "modulation" not in p:
        return [0, 0, 1] * (count // 3)
    return [dense(p["modulation"]["linear"], time, i) for i in range(count)]


def gau_by_hand(p, x, position, time, allowed, cfg):
    scale, shift, gate = modulations(p, time, 3)
    h = rms(x, p["norm"]["scale"]) * (1 + scale) + shift
    u, v = (swish(dense(p["gates"], h, i)) for i in (0, 1))
    z = swish(dense(p["shared"], h))
    q, k = (z * p["scale_qk"][i] + p["shift_qk"][i] for i in (0, 1))
    if cfg.qk_norm:
        q, k = rms(q, p["norm_q"]["scale"]), rms(k, p["norm_k"]["scale"])
    q, k = (turn(a, position, p, cfg) for a in (q, k))
    return x + gate * dense(p["out"], u * mix(q, k, v, allowed, cfg.key_width**-0.5))


def transformer_by_hand(p, x, position, time, allowed, cfg):
    scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = modulations(p, time, 6)
    h = rms(x, p["norm_attention"]["scale"]) * (1 + scale) + shift
    q, k, v = (dense(p["qkv"], h, i) for i in range(3))
    heads = []
    for head, start in enumerate(range(0, cfg.width, cfg.head_width)):
        part = slice(start, start + cfg.head_width)
        one, two = q[..., part], k[..., part]
        if cfg.qk_norm:
            one, two = rms(one, p["norm_q"]["scale"]), rms(two, p["norm_k"]["scale"])
        one, two = (turn(a, position, p, cfg, head) for a in (one, two))
        heads.append(mix(one, two, v[..., part], allowed, cfg.head_width**-0.5))
    x = x + gate * dense(p["attention_out"], np.concatenate(heads, -1))
    h = rms(x, p["norm_mlp"]["scale"]) * (1 + scale_mlp) + shift_mlp
    inner, up = (dense(p["gate_up"], h, i) for i in (0, 1))
    return x + gate_mlp * dense(p["down"], swish(inner) * up)


OPTIONS = [{}, {"qk_norm": True}, {"bias": True}, {"rope": "mixed"}, {"rope": "none"}, {"time": "adaln", "bias": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize(("block", "by_hand"), [(GatedAttentionUnit, gau_by_hand), (TransformerBlock, transformer_by_hand)])
def test_block_equals_numpy(block, by_hand, options):
    cfg = Model(width=24, depth=1, patch=2, key_width=8, head_width=12, **options)
    rng = np.random.default_rng(0)
    module = block(cfg, nnx.Rngs(params=0))
    graph, state = nnx.split(module)
    params = jax.tree.map(lambda a: np.asarray(a + 0.3 * rng.standard_normal(a.shape), np.float32), nnx.to_pure_dict(state))
    module = nnx.merge(graph, params)
    x = rng.standard_normal((B, T, cfg.width)).astype(np.float32)
    position = rng.uniform(0, 9, (B, T, 2)).astype(np.float32)
    t = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    mask = IntervalMask(t // 3, t + 1, np.minimum(t + 2, T - 1), np.minimum(t + 3, T))
    angles = rotation(jnp.asarray(position), cfg.key_width if block is GatedAttentionUnit else cfg.head_width, cfg.rope_base)
    time = 0.1 * rng.standard_normal((B, T, TIME_WIDTH)).astype(np.float32)
    around = Around(position, angles if cfg.rope == "axial" else None, mask, time)
    ours, _ = jax.jit(lambda x: module(x, around, None))(x)
    exact = jax.tree.map(lambda a: a.astype(np.float64), params)
    allowed = np.asarray(mask.dense(T))
    np.testing.assert_allclose(ours, by_hand(exact, x, position, time, allowed, cfg), atol=5 * TOLERANCE, rtol=TOLERANCE)
    allowed = allowed.copy()
    allowed[:, 5, 2] ^= True  # the comparison sees one wrong entry of the mask
    assert np.abs(ours - by_hand(exact, x, position, time, allowed, cfg))[:, 5].max() > 1e-3


def test_rms_norm():
    norm = RMSNorm(8)
    norm.scale[...] = jnp.arange(8.0)
    x = 3 * np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(norm(x), rms(x, np.arange(8.0)), atol=TOLERANCE)
    assert np.all(np.isfinite(norm(jnp.zeros((1, 8)))))
    # the mean square is taken in float32: in bfloat16 it would be off by up to 1/128
    low = jnp.asarray(x, jnp.bfloat16)
    assert norm(low).dtype == jnp.bfloat16


def test_linear_keeps_variance_and_type():
    axes = (None, None)
    layer = Linear(512, 256, nnx.Rngs(params=0), axes=axes)
    x = jax.random.normal(jax.random.key(1), (3, 40, 512))
    assert layer(x).shape == (3, 40, 256)
    assert 0.9 < float(layer(x).std()) < 1.1
    assert 0.45 < float(Linear(512, 256, nnx.Rngs(params=0), axes=axes, gain=0.5)(x).std()) < 0.55
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(x)[1], x[1] @ layer.kernel[...], atol=1e-4)


@pytest.mark.parametrize(("width", "patch"), [(48, 4), (96, 4), (192, 8)])
def test_patches_survive_the_projection_exactly(width, patch):
    image = RawPatches(Model(width=width, patch=patch), nnx.Rngs(params=0))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 300, 3 * patch**2), dtype=np.uint8)
    cell = jnp.asarray(patch_cells(15, 20))[None]
    back = image.invert(image.embed(normalise(jnp.asarray(pixels)), jnp.zeros((1, 300)), cell), cell)
    np.testing.assert_array_equal(np.rint((np.asarray(back) + 1) * 127.5), pixels)


def test_a_narrow_projection_loses_pixels():
    """The control of the test above: below 3 patch^2 the map cannot be inverted."""
    image = RawPatches(Model(width=40, patch=4, lossless=False), nnx.Rngs(params=0))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 50, 48), dtype=np.uint8)
    cell = jnp.zeros((1, 50, 4), jnp.int32)
    back = image.invert(image.embed(normalise(jnp.asarray(pixels)), jnp.zeros((1, 50)), cell), cell)
    assert np.any(np.rint((np.asarray(back) + 1) * 127.5) != pixels)


def test_time_reaches_the_patches_smoothly():
    image = RawPatches(Model(width=48, patch=4), nnx.Rngs(params=0))
    z, cell = jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, 4), jnp.int32)
    at = lambda u: np.asarray(image.embed(z, jnp.full((1, 1), u), cell))
    assert np.abs(at(0.5) - at(0.0)).max() > 0.1
    assert np.abs(at(0.501) - at(0.5)).max() < 0.02


def test_places_reach_the_patches_and_do_not_depend_on_the_size():
    """The same fraction of the way through a large and a small image is the same place."""
    image = RawPatches(Model(width=48, patch=4), nnx.Rngs(params=0))
    embed = lambda cell: np.asarray(image.embed(jnp.zeros((1, len(cell), 48)), jnp.zeros((1, len(cell))), cell[None]))[0]
    small, large = embed(patch_cells(1, 1)), embed(patch_cells(3, 5))
    np.testing.assert_allclose(small[0], large[7], atol=1e-5)
    apart = np.abs(large[:, None] - large[None]).max(-1) + np.eye(15)
    assert apart.min() > 0.05


def test_time_table_takes_the_nearest_entry():
    image = RawPatches(Model(width=48, patch=4, time_embedding="table", places="none"), nnx.Rngs(params=0))
    both = image.embed(jnp.zeros((1, 2, 48)), jnp.asarray([[0.0, 1.0]]), jnp.zeros((1, 2, 4), jnp.int32))[0]
    np.testing.assert_allclose(both, image.time_in.time_table[...][jnp.asarray([0, 999])], atol=1e-6)
