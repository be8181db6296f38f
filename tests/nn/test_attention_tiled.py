"""The tiled forms of attention against the dense one, under every kind of mask; what they skip, keep and exchange."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmdiff import config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.layout import ImagePiece, IntervalMask, TextPiece, lay_out, pack, plan_images, stack
from mmdiff.nn import attention_blockwise, attention_pallas
from mmdiff.nn.attention import KeyValue, by_platform, dense_attention
from mmdiff.nn.attention_blockwise import blockwise_attention
from mmdiff.nn.attention_pallas import pallas_attention
from mmdiff.nn.attention_tiled import SAVED, needed_tiles, tiled_attention

T, BLOCK = 300, 128  # not a multiple
B, H, C, E = 2, 2, 16, 24
SCALE = C**-0.5
TOLERANCE = 1e-5  # of the largest number, or of 1: one key alone has a gradient of 0


def dense(q, k, v, mask):
    return dense_attention(q, [KeyValue(k, v)], mask, scale=SCALE)


def blockwise(q, k, v, mask):
    return blockwise_attention(q, k, v, mask, scale=SCALE, block=BLOCK)


def pallas(q, k, v, mask):
    return pallas_attention(q, k, v, mask, scale=SCALE, block=BLOCK, interpret=True)


def both_ways(function):
    """(out, dq, dk, dv)."""

    def run(q, k, v, mask, g):
        out, transpose = jax.vjp(lambda *qkv: function(*qkv, mask), q, k, v)
        return out, *transpose(g)

    return run


DENSE, BLOCKWISE, PALLAS = (jax.jit(both_ways(function)) for function in (dense, blockwise, pallas))
TILED = {"blockwise": BLOCKWISE, "pallas": PALLAS}


def inputs(seed: int = 0, dtype=np.float32):
    """q, k, v and a gradient of the result."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, H, T, width)), dtype) for width in (C, C, E, E)]


def intervals(*vectors) -> IntervalMask:
    return IntervalMask(*(np.broadcast_to(np.asarray(x, np.int32), (B, T)) for x in vectors))


def random_intervals(rng, longest: int, *, start=None):
    """Starts and ends [B, T], some empty, some behind the last key."""
    start = rng.integers(0, T, (B, T)) if start is None else start
    return start, start + rng.integers(0, longest, (B, T))


def masks() -> dict[str, IntervalMask]:
    rng = np.random.default_rng(0)
    t, nothing = np.arange(T), (7, 7)
    short, long = random_intervals(rng, 20), random_intervals(rng, T)
    overlapping = random_intervals(rng, 40, start=np.maximum(short[0] - 10, 0))
    return {
        "causal": intervals(0, t + 1, *nothing),
        "everything": intervals(0, T, 0, T),
        "only itself": intervals(t, t + 1, *nothing),
        "one far key": intervals((t * 37) % T, (t * 37) % T + 1, *nothing),
        "nothing for some": intervals(0, np.where(t % 3, t, 0), *nothing),
        "nothing for a whole block": intervals(0, np.where(t < BLOCK, 0, t), *nothing),
        "nothing at all": intervals(*nothing, *nothing),
        "ends before it starts": intervals(t, t - 5, t, t + 1),
        "empty context": intervals(t, t, *long),
        "overlapping": intervals(*short, *overlapping),
        "block before context": intervals(T - 20, T, 3, 9),
        "around a block's edge": intervals(BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1),
        "two random": intervals(*long, *random_intervals(rng, 60)),
    }


def packed(seed: int) -> IntervalMask:
    """Rows as training sees them: documents of texts and images, clean and noised, and padding."""
    rng, layout, vocabulary = np.random.default_rng(seed), config.Layout(row_length=T), Vocabulary(None)

    def document():
        text = lambda: TextPiece(np.zeros(rng.integers(1, 30), np.int32))
        image = lambda: ImagePiece(None, *rng.integers(1, 5, 2))
        pieces = [text() if rng.random() < 0.6 else image() for _ in range(rng.integers(1, 6))]
        plans = plan_images(pieces, layout, rng.random() < 0.5)
        return lay_out(pieces, plans, vocabulary, layout, patch_values=0)[0]

    def row():
        documents, length = [document()], 0
        while (length := length + len(documents[-1].tokens)) < T:
            documents.append(document())
        return pack(documents[:-1], T)

    return stack([row() for _ in range(B)]).mask


def check(function, mask, q, k, v, g, tolerance=TOLERANCE):
    """Out and gradients equal those of `dense`; a query that may read nothing gets zeros and gives none."""
    reads = np.asarray(mask.dense(T).any(-1))[:, None, :, None]
    wanted = DENSE(q, k, v, mask, g * reads)
    wanted = wanted[0] * reads, *wanted[1:]
    for ours, theirs in zip(function(q, k, v, mask, g), wanted, strict=True):
        theirs = np.asarray(theirs, np.float64)
        assert np.all(np.isfinite(np.asarray(ours, np.float64)))
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * max(np.abs(theirs).max(), 1))


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("name", masks())
def test_equals_dense_with_gradients(impl, name):
    check(TILED[impl], masks()[name], *inputs())


@pytest.mark.parametrize("impl", TILED)
def test_equals_dense_on_packed_rows(impl):
    for seed in range(4):
        check(TILED[impl], packed(seed), *inputs(seed))


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("field", IntervalMask._fields)
def test_a_mask_that_is_off_by_one_is_found(impl, field):
    mask = packed(0)
    interval = field.split("_")[0]
    some = np.asarray(getattr(mask, f"{interval}_end") > getattr(mask, f"{interval}_start"))
    shifted = mask._replace(**{field: np.where(some, getattr(mask, field) + 1, getattr(mask, field)).astype(np.int32)})
    arrays = inputs()
    ours, theirs = TILED[impl](*arrays[:3], shifted, arrays[3]), DENSE(*arrays[:3], mask, arrays[3])
    assert all(np.abs(a - b).max() > 1000 * TOLERANCE * np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("impl", TILED)
def test_bfloat16_is_as_close_as_its_precision(impl):
    check(TILED[impl], masks()["two random"], *inputs(dtype=jnp.bfloat16), tolerance=0.03)


def test_queries_and_keys_of_different_number():
    q, k, v, _ = inputs()
    short, mask = q[:, :, :40], IntervalMask(*(x[:, :40] for x in masks()["two random"]))
    run = lambda function: np.asarray(jax.jit(function)(short, k, v, mask))
    np.testing.assert_allclose(run(blockwise), run(dense), atol=TOLERANCE)
    np.testing.assert_allclose(run(pallas), run(dense), atol=TOLERANCE)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (32, 128)])
def test_needed_tiles_are_those_with_an_allowed_pair(block):
    for mask in [*masks().values(), packed(5)]:
        allowed = np.pad(mask.dense(T), ((0, 0), (0, -T % block[0]), (0, -T % block[1])))
        tiles = allowed.reshape(B, -1, block[0], allowed.shape[2] // block[1], block[1]).any((2, 4))
        np.testing.assert_array_equal(needed_tiles(mask, T, block), tiles)


def everything_is_needed(mask, keys, block):
    return jnp.ones_like(needed_tiles(mask, keys, block))


def the_last_tile_is_forgotten(mask, keys, block):
    needed = needed_tiles(mask, keys, block)
    return needed.at[:, -1, -1].set(False)


@pytest.mark.parametrize("module, function", [(attention_blockwise, blockwise), (attention_pallas, pallas)])
def test_other_tiles_are_not_visited_and_needed_ones_are(module, function, monkeypatch):
    """Keys of a block that nobody reads are not a number: no visit, no trace of them."""
    q, k, v, g = inputs()
    mask = intervals(2 * BLOCK, T, 3, 9)
    unread = (np.arange(T) >= BLOCK) & (np.arange(T) < 2 * BLOCK)
    k, v = (jnp.where(unread[:, None], jnp.nan, x) for x in (k, v))
    run = lambda: [np.asarray(x) for x in jax.jit(both_ways(lambda *a: function(*a)))(q, k, v, mask, g)]
    out, dq, dk, dv = run()
    assert all(np.all(np.isfinite(x)) for x in (out, dq, dk[:, :, ~unread], dv[:, :, ~unread]))
    monkeypatch.setattr(module, "needed_tiles", everything_is_needed)
    assert any(np.any(np.isnan(x)) for x in run())
    monkeypatch.setattr(module, "needed_tiles", the_last_tile_is_forgotten)
    for right, wrong in zip((out, dq, dk, dv), run(), strict=True):
        assert np.nanmax(np.abs(right - wrong)) > 1000 * TOLERANCE


def temporaries(function, length: int) -> int:
    """Bytes, beside inputs and outputs, of a compiled forward and backward pass."""
    q, k, v, g = (jax.ShapeDtypeStruct((1, 1, length, width), jnp.float32) for width in (32, 32, 64, 64))
    mask = IntervalMask(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 4)
    return jax.jit(both_ways(function)).lower(q, k, v, mask, g).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    more = temporaries(blockwise, 4096) - temporaries(blockwise, 1024)
    assert more <= (4096 - 1024) * (2 * 32 + 4) * 4  # float32: scaled q, dq, and lse, delta and twice the lists
    assert temporaries(dense, 2048) - temporaries(dense, 1024) > (2048**2 - 1024**2) * 4


def test_a_rematerialisation_policy_can_keep_the_result():
    """Then the backward pass recomputes what leads to attention, but not attention."""

    def count(**options):
        def layer(x, w):
            q = jnp.tanh(x @ w)
            return x + blockwise(q, q, q, mask), None

        loss = lambda w, x: jax.lax.scan(jax.checkpoint(layer, **options), x, w)[0].sum()
        program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, C, C)), x))
        return program.count(" while["), program.count(" tanh ")

    x, mask = inputs()[0], masks()["causal"]
    kept = count(policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    every = count()
    assert every[1] == kept[1] == 2  # the projection is recomputed either way
    assert every[0] == kept[0] + 1  # attention only without the policy


def auto(q, k, v, mask):
    block = attention_pallas.BLOCK
    return tiled_attention(by_platform(), q, k, v, mask, scale=SCALE, block=(block, block))


def report_exchanges():
    """On four devices: results equal those of one, and what the devices exchange, one line per way to call."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays, mask = inputs(), masks()["two random"]
    *qkv, g = (jax.device_put(x, NamedSharding(mesh, P("data", "tensor"))) for x in arrays)
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), mask)
    specs = {"in_specs": (P("data", "tensor"),) * 3 + (P("data"),), "out_specs": P("data", "tensor")}
    apart = {
        name: jax.shard_map(function, mesh=mesh, **specs) for name, function in (("apart", blockwise), ("auto apart", auto))
    }
    for name, function in {"together": blockwise, **apart}.items():
        compiled = jax.jit(both_ways(function)).lower(*qkv, spread, g).compile()
        for ours, theirs in zip(compiled(*qkv, spread, g), BLOCKWISE(*arrays[:3], mask, arrays[3]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
        exchanges = re.findall(r"= (.*) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
        print(f"{name}:", *(f"{operation} {what}" for what, operation in exchanges))


def test_sharded_rows_exchange_only_which_tiles_they_need():
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_attention_tiled as t; t.report_exchanges()"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together, *apart = done.stdout.splitlines()
    assert "all-reduce" in together and not re.search("all-gather|all-to-all|permute|scatter", together)
    assert set(re.findall(r"\w+\[[\d,]*\]", together)) == {"pred[3,3]"}
    assert apart == ["apart:", "auto apart:"]
