"""The network: who reads whom (by exact zeros of gradients), packing, permutations, recomputation, scanning, tangents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff.layout import ImagePlan, Rows
from mmdiff.models import transfusion
from mmdiff.models.network import Network
from mmdiff.training.flops import counted_flops

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def document(tiny_gau) -> Rows:
    """Text, a wide image, text, a square image, text; clean copy and noised block of each image."""
    return tiny_gau.lay(tiny_gau.pieces("12", (2, 3), "4", (2, 2), "56"))


@pytest.fixture(scope="module")
def row(tiny_gau, document) -> Rows:
    """Two documents and padding."""
    other = tiny_gau.lay(tiny_gau.pieces("7", (1, 2), seed=9), [ImagePlan(False, 1)])
    return tiny_gau.batch([document, other], length=64)


@functools.partial(jax.jit, static_argnames="network")
def influence(network: Network, params, rows: Rows, z, u):
    """bool [t, s]: whether position t's hidden state has any gradient with respect to what stands at s."""
    model = network.bind(params)
    x = model.embed(rows.tokens, rows.is_patch, z, u, rows.cell).x

    def weighted(x):  # random weights: no gradient cancels
        hidden = model.stack(transfusion.Embedded(x), rows.position, rows.mask)[0][0]
        return (hidden * jax.random.normal(jax.random.key(3), hidden.shape)).sum(-1)

    # one position after another: under vmap, jaxlib 0.10.2 miscompiles this backward pass on CPU
    _, backward = jax.vjp(weighted, x)
    return jax.lax.map(lambda one: (backward(one)[0][0] != 0).any(-1), jnp.eye(len(weighted(x))))


@pytest.fixture(scope="module", params=["gau", "attention"])
def reads(request, row):
    tiny = request.getfixturevalue(f"tiny_{request.param}")
    return np.asarray(influence(tiny.network, tiny.params, row, *tiny.noise(row)))


@dataclasses.dataclass(frozen=True)
class Places:
    """Positions of `row` by what stands there."""

    text: np.ndarray
    clean: list[np.ndarray]
    noised: list[np.ndarray]
    padding: np.ndarray
    second: np.ndarray  # the second document


@pytest.fixture(scope="module")
def places(row, document) -> Places:
    one = jax.tree.map(lambda a: a[0], row)
    first, t = len(document.tokens), np.arange(64)
    padding = (t >= first) & ~one.is_patch & (one.tokens == 0)
    each = lambda noised: [np.flatnonzero((one.image == k) & (one.noised == noised)) for k in (1, 2)]
    return Places(np.flatnonzero(~one.is_patch & (t < first)), each(False), each(True), np.flatnonzero(padding), t[t >= first])


@pytest.mark.parametrize("limit", [2**24, 200])
def test_text_nats_are_the_cross_entropy_of_the_logits(tiny, row, monkeypatch, limit):
    """Whole, and in pieces that hold few logits at a time; gradients too."""
    monkeypatch.setattr(transfusion, "LOGITS_LIMIT", limit)
    hidden = jax.random.normal(jax.random.key(0), (2, 64, tiny.cfg.model.width))
    targets = jax.random.randint(jax.random.key(1), (2, 64), 0, tiny.vocabulary.size)

    def ours(params, hidden):
        return tiny.network.bind(params).text_nats(hidden, targets)

    def reference(params, hidden):
        logits = tiny.network.bind(params).text_logits(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    np.testing.assert_allclose(ours(tiny.params, hidden), reference(tiny.params, hidden), atol=1e-5)
    weight = jnp.linspace(0, 1, 64)
    got, want = (
        jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weight), argnums=(0, 1))(tiny.params, hidden) for f in (ours, reference)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
    unused = got[0]["text_out"]["kernel"][:, tiny.vocabulary.size :]
    assert unused.shape[1] > 0 and not jnp.any(unused)  # the head is wider than the vocabulary; the rest is never learnt


def test_influence_is_exactly_what_the_mask_allows(reads, row):
    """Through two layers: a position reads what the positions it reads read, and nothing else at all."""
    allowed = np.asarray(row.mask.dense(64))[0] | np.eye(64, dtype=bool)
    through = (allowed.astype(int) @ allowed.astype(int)) > 0
    np.testing.assert_array_equal(reads, through)


def test_a_wrong_mask_changes_the_influence(tiny, row):
    """The control of the test above."""
    wrong = row.context_end.copy()
    wrong[0, 1] += 1  # the first text token looks one ahead
    seen = influence(tiny.network, tiny.params, dataclasses.replace(row, context_end=wrong), *tiny.noise(row))
    assert bool(seen[1, 2])


def test_text_never_reads_a_later_token(reads, places):
    for t in places.text:
        assert not reads[t, places.text[places.text > t]].any()
        assert reads[t, places.text[places.text <= t]].all()


def test_text_never_reads_a_noised_block_but_reads_the_clean_copy(reads, places):
    noised, after = np.concatenate(places.noised), places.text[places.text > places.clean[1].max()]
    assert len(after) and not reads[np.ix_(places.text, noised)].any()
    for clean in places.clean:
        assert not reads[np.ix_(clean, noised)].any()
        assert reads[np.ix_(after, clean)].all()


def test_a_noised_block_reads_its_text_and_itself_but_no_other_block(reads, places):
    for k, own in enumerate(places.noised):
        other, clean = places.noised[1 - k], places.clean[k]
        assert reads[np.ix_(own, own)].all()
        assert reads[np.ix_(own, places.text[places.text < clean.min()])].all()
        assert not reads[np.ix_(own, other)].any()
        assert not reads[np.ix_(own, clean)].any(), "a noised image must not see its own clean copy"
        assert not reads[np.ix_(own, places.text[places.text > clean.max()])].any()
    assert reads[np.ix_(places.noised[1], places.clean[0])].all(), "the second image is drawn with the first one in sight"


def test_images_are_read_in_both_directions(reads, places):
    for patches in (*places.clean, *places.noised):
        first, last = patches[0], patches[-1]
        assert reads[first, last] and reads[last, first]


def test_packed_documents_do_not_read_each_other_and_padding_reads_itself(reads, places):
    first = np.setdiff1d(np.arange(64), places.second)
    assert not reads[np.ix_(first, places.second)].any()
    assert not reads[np.ix_(places.second, first)].any()
    np.testing.assert_array_equal(reads[places.padding], np.eye(64, dtype=bool)[places.padding])


def test_packed_rows_equal_unpacked_documents(tiny, document, row):
    """Also: outputs at padding are finite."""
    size = len(document.tokens)
    other = jax.tree.map(lambda a: a[0, size:], row)
    count = int(other.is_patch.sum()) + 5  # BOS, a digit, [IMG] and its size, then a noised block
    other = tiny.lay(tiny.pieces("7", (1, 2), seed=9), [ImagePlan(False, 1)])
    assert len(other.tokens) == count
    z, u = tiny.noise(row)
    logits, patches = tiny.forward(row, z, u)
    assert np.all(np.isfinite(logits)) and np.all(np.isfinite(patches))
    for start, alone in ((0, document), (size, other)):
        here = slice(start, start + len(alone.tokens))
        pad = lambda a, here=here: np.pad(a[:, here], [(0, 0), (0, 64 - (here.stop - here.start))] + [(0, 0)] * (a.ndim - 2))
        text, image = tiny.forward(tiny.batch([alone]), pad(z), pad(u))
        length = len(alone.tokens)
        np.testing.assert_allclose(text[0, :length], logits[0, here], atol=TOLERANCE)
        np.testing.assert_allclose(image[0, :length], patches[0, here], atol=TOLERANCE)
    # control: a document that starts one position late is another row
    text, _ = tiny.forward(tiny.batch([document]), np.roll(z, 1, axis=1), u)
    assert np.abs(text[0, :size] - logits[0, :size]).max() > 1e-3


def test_permuting_patches_changes_the_output(tiny, document):
    """Without positions a transformer is equivariant to the order of its patches: the same multiset, the same picture."""
    row = tiny.batch([document])
    z, u = tiny.noise(row)
    block = np.flatnonzero(row.noised[0] & (row.image[0] == 1))
    order = np.roll(block, 1)
    shuffled = z.copy()
    shuffled[0, block] = z[0, order]
    _, plain = tiny.forward(row, z, u)
    _, moved = tiny.forward(row, shuffled, u)
    assert np.abs(moved[0, block] - plain[0, order]).max() > 1e-2
    # control: with positions and places permuted as well, the output is just permuted
    position, cell = row.position.copy(), row.cell.copy()
    position[0, block], cell[0, block] = row.position[0, order], row.cell[0, order]
    _, both = tiny.forward(dataclasses.replace(row, position=position, cell=cell), shuffled, u)
    np.testing.assert_allclose(both[0, block], plain[0, order], atol=TOLERANCE)


def value_and_gradient(tiny, network, rows):
    z, u = tiny.noise(rows)

    @jax.jit
    def run(params):
        def total(params):
            model = network.bind(params)
            logits, patches = model(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
            weight = jax.random.normal(jax.random.key(0), logits.shape)
            return jnp.mean(logits * weight) + jnp.mean(jnp.square(patches)), (logits, patches)

        return jax.value_and_grad(total, has_aux=True)(params)

    return run(tiny.params)


def test_recomputed_and_scanned_layers_equal_unrolled_ones(tiny, row, monkeypatch):
    (_, plain), gradient = value_and_gradient(tiny, tiny.network, row)
    recomputed = Network(dataclasses.replace(tiny.cfg.model, remat="full"), tiny.vocabulary.size)
    variants = [value_and_gradient(tiny, recomputed, row)]
    monkeypatch.setattr(transfusion, "UNROLL_LIMIT", 0)
    assert "scan" in str(jax.make_jaxpr(lambda p: network_forward(recomputed, p, row))(tiny.params))
    variants.append(value_and_gradient(tiny, recomputed, row))
    for (_, out), grads in variants:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE), (plain, gradient), (out, grads))


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_every_way_of_recomputing_gives_the_same_gradients(tiny, row, monkeypatch, remat, attention):
    _, gradient = value_and_gradient(tiny, tiny.network, row)
    monkeypatch.setattr(transfusion, "UNROLL_LIMIT", 0)
    other = Network(dataclasses.replace(tiny.cfg.model, remat=remat, attention=attention), tiny.vocabulary.size)
    _, grads = value_and_gradient(tiny, other, row)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE), gradient, grads)


def test_recomputing_more_takes_less_memory_and_more_operations(new_tiny, monkeypatch):
    monkeypatch.setattr(transfusion, "UNROLL_LIMIT", 0)
    temporaries, operations = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        tiny = new_tiny(block="attention", width=128, depth=4, remat=remat, attention="blockwise")
        rows = tiny.batch(*[[tiny.lay(tiny.pieces("12", (4, 4), seed=s))] for s in range(4)], length=256)
        z, u = tiny.noise(rows)

        def loss(params, network=tiny.network, rows=rows, z=z, u=u):
            logits, patches = network.bind(params)(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
            return jnp.sum(logits**2) + jnp.sum(patches**2)

        compiled = jax.jit(jax.grad(loss)).lower(tiny.params).compile()
        temporaries[remat] = compiled.memory_analysis().temp_size_in_bytes
        operations[remat] = counted_flops(jax.grad(loss), tiny.params)
    assert temporaries["none"] > temporaries["dots"] > temporaries["full"]
    assert temporaries["none"] > temporaries["attention"] > temporaries["full"]
    assert operations["none"] < operations["attention"] <= operations["full"]


def network_forward(network, params, rows):
    zeros = np.zeros(rows.tokens.shape, np.float32)
    z = np.zeros(rows.patches.shape, np.float32)
    return network.bind(params)(rows.tokens, rows.is_patch, z, zeros, rows.cell, rows.position, rows.mask)


def test_blockwise_network_equals_dense_network(tiny, row):
    blockwise = Network(dataclasses.replace(tiny.cfg.model, attention="blockwise"), tiny.vocabulary.size)
    z, u = tiny.noise(row)
    for ours, theirs in zip(
        dataclasses.replace(tiny, network=blockwise).forward(row, z, u), tiny.forward(row, z, u), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_forward_mode_differentiation(tiny, row):
    """The tangent along a direction of u and z: few-step training needs it. Against a finite difference."""
    z, u = tiny.noise(row)
    du = row.noised.astype(np.float32)
    model = tiny.network.bind(tiny.params)
    run = jax.jit(lambda u: model(row.tokens, row.is_patch, z, u, row.cell, row.position, row.mask)[1])
    _, tangent = jax.jvp(run, (u,), (du,))
    step = np.float32(1e-2)
    difference = (run(u + step * du) - run(u - step * du)) / (2 * step)
    assert np.abs(tangent[row.noised]).max() > 0.01
    np.testing.assert_allclose(tangent, difference, atol=5e-3 * float(np.abs(tangent).max()))


def test_rotary_positions_alone_tell_patches_apart(new_tiny, document):
    """The test above without the embedding of places."""
    tiny = new_tiny(places="none")
    row = tiny.batch([document])
    z, u = tiny.noise(row)
    block = np.flatnonzero(row.noised[0] & (row.image[0] == 1))
    shuffled = z.copy()
    shuffled[0, block] = z[0, np.roll(block, 1)]
    (_, plain), (_, moved) = tiny.forward(row, z, u), tiny.forward(row, shuffled, u)
    assert np.abs(moved[0, block] - plain[0, np.roll(block, 1)]).max() > 1e-2


def test_untrained_heads_are_zero(tiny, row):
    fresh = tiny.network.init(jax.random.key(0))
    logits, patches = dataclasses.replace(tiny, params=fresh).forward(row, *tiny.noise(row))
    assert not np.any(logits) and not np.any(patches)


def test_time_reaches_noised_patches_only_through_u(tiny, row):
    z, u = tiny.noise(row)
    _, plain = tiny.forward(row, z, u)
    logits, later = tiny.forward(row, z, np.where(u > 0, u + 0.1, 0).astype(np.float32))
    assert np.abs(plain - later)[row.noised].max() > 1e-3
    np.testing.assert_array_equal(logits[~row.noised], tiny.forward(row, z, u)[0][~row.noised])


def test_tied_embeddings_and_query_key_norm(new_tiny, row):
    tied = new_tiny(tie_embeddings=True, qk_norm=True, block="attention")
    assert "text_out" not in tied.params
    logits, _ = tied.forward(row, *tied.noise(row))
    assert np.all(np.isfinite(logits)) and np.any(logits)


def test_bfloat16_compute_is_close_and_parameters_stay_float32(tiny, row):
    low = Network(dataclasses.replace(tiny.cfg.model, compute="bfloat16"), tiny.vocabulary.size)
    assert {a.dtype for a in jax.tree.leaves(low.init(jax.random.key(0)))} == {jnp.dtype("float32")}
    exact, _ = tiny.forward(row, *tiny.noise(row))
    rough, _ = dataclasses.replace(tiny, network=low).forward(row, *tiny.noise(row))
    assert rough.dtype == jnp.float32
    error = float(np.abs(np.asarray(rough) - exact).max())
    assert 1e-5 < error < 0.1 * float(np.abs(exact).max())
