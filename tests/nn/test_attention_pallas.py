"""The TPU kernels: wide values in slices, the lists of visits, the account of VMEM, and the compiler for TPUs."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from mmdiff.layout import IntervalMask
from mmdiff.nn import attention_pallas
from mmdiff.nn.attention import KeyValue, attention, dense_attention
from mmdiff.nn.attention_kernels import HIGH, LOW
from mmdiff.nn.attention_pallas import KERNELS, VMEM_LIMIT, choose_sizes, list_visits, pallas_attention, vmem_bytes
from mmdiff.nn.attention_tiled import SAVED

BFLOAT16 = jnp.dtype("bfloat16")
SHAPES = {  # heads, width, values
    "12 heads of 64": (12, 64, 64),
    "32 heads of 128": (32, 128, 128),
    "gau 3072": (1, 128, 3072),
    "gau 8192": (1, 128, 8192),
}


def both_ways(function):
    def run(q, k, v, mask, g):
        out, transpose = jax.vjp(lambda *qkv: function(*qkv, mask), q, k, v)
        return out, *transpose(g)

    return run


def test_wide_values_in_slices(monkeypatch):
    """Slices of 128 of 384 values; the mask leaves tiles out."""
    monkeypatch.setattr(attention_pallas, "SLICE", 128)
    choose_sizes.cache_clear()
    assert choose_sizes("dkv", 32, 384, jnp.dtype("float32"), 128).values == 128
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((1, 1, 384, width)).astype(np.float32) for width in (32, 32, 384, 384))
    t = np.arange(384, dtype=np.int32)[None]
    mask = IntervalMask(t // 150 * 150, t + 1, (t + 200) % 380, (t + 200) % 380 + 3)
    dense = both_ways(lambda q, k, v, mask: dense_attention(q, [KeyValue(k, v)], mask, scale=0.2))
    ours = both_ways(lambda q, k, v, mask: pallas_attention(q, k, v, mask, scale=0.2, block=128, interpret=True))
    for a, b in zip(jax.jit(ours)(q, k, v, mask, g), jax.jit(dense)(q, k, v, mask, g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    choose_sizes.cache_clear()


def test_lists_hold_every_needed_tile_once_and_every_block():
    needed = np.random.default_rng(0).random((3, 5, 7)) < 0.2
    needed[0, 2] = False  # a block that needs nothing is visited all the same: its result must be written
    visits = list_visits(jnp.asarray(needed))
    for row, listed, count in zip(needed, np.asarray(visits.listed), np.asarray(visits.count), strict=True):
        pairs = list(zip(listed >> HIGH, listed & LOW, strict=True))
        empty = [(i, 0) for i in range(5) if not row[i].any()]
        assert pairs[:count] == sorted([*zip(*np.nonzero(row), strict=True), *empty])
        assert set(pairs[count:]) == {pairs[count - 1]}  # repeated: nothing more is copied
    assert needed[0, 2].sum() == 0 and (visits.count[0] > needed[0].sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_sizes_fit_and_the_next_larger_do_not(name, dtype):
    _, width, values = SHAPES[name]
    for kernel in KERNELS:
        sizes = choose_sizes(kernel, width, values, jnp.dtype(dtype))
        assert vmem_bytes(kernel, sizes, width, values, dtype) <= VMEM_LIMIT
        assert sizes.queries % 128 == sizes.keys % 128 == values % sizes.values == 0
        if sizes.queries < attention_pallas.BLOCK:
            assert vmem_bytes(kernel, sizes._replace(queries=2 * sizes.queries), width, values, dtype) > VMEM_LIMIT
    with pytest.raises(ValueError, match=f"needs more than .* bytes of VMEM for heads of {width} and 65536 in {dtype}"):
        choose_sizes("dkv", width, 2**16, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def chips():
    """The first chip of each kind, described by TPU's compiler, which needs no TPU."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs (libtpu) is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # ask no cloud for its machine
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other test processes may do the same
        describe = lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        return {"v5e": describe("v5e:2x2"), "v5p": describe("v5p:2x2x1")}


def kernels(program) -> list[tuple[str, int]]:
    """The kernels of a compiled program, and the bytes of VMEM that the compiler gave to each."""
    calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    scoped = re.compile(r'"used_scoped_memory_configs":\[{"memory_space":"1",[^]]*?"size":"(\d+)"')
    return [(re.search(r"attention_([a-z]+)", line).group(1), int(scoped.search(line).group(1))) for line in calls]


@pytest.mark.parametrize("chip, name", [("v5e", name) for name in SHAPES] + [("v5p", "12 heads of 64"), ("v5p", "gau 8192")])
def test_compiles_for_tpus_within_the_account_of_vmem(chips, chip, name):
    """`auto`, so this also shows that the platform of the program decides, not that of this machine."""
    heads, width, values = SHAPES[name]
    place, length = jax.sharding.SingleDeviceSharding(chips[chip]), 4096
    array = lambda width: jax.ShapeDtypeStruct((1, heads, length, width), jnp.bfloat16, sharding=place)
    mask = IntervalMask(*[jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)] * 4)
    auto = both_ways(lambda q, k, v, mask: attention(q, [KeyValue(k, v)], mask, scale=0.1))
    used = kernels(jax.jit(auto).lower(array(width), array(width), array(values), mask, array(values)).compile())
    assert sorted(kernel for kernel, _ in used) == sorted(KERNELS)
    for kernel, size in used:
        assert 0 < size <= vmem_bytes(kernel, choose_sizes(kernel, width, values, BFLOAT16), width, values, BFLOAT16)


def test_a_rematerialisation_policy_can_keep_the_result(chips):
    place = jax.sharding.SingleDeviceSharding(chips["v5e"])
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in ((3, 128), (1, 1, 1024, 128)))
    mask = IntervalMask(*[jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=place)] * 4)

    def loss(w, x, mask):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
        def layer(x, w):
            return x + attention(x * w, [KeyValue(x, x)], mask, scale=1.0, impl="pallas"), None

        return jax.lax.scan(layer, x, w)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(w, x, mask).compile()
    assert sorted(kernel for kernel, _ in kernels(program)) == ["dkv", "dq", "forward"]  # not a second forward
