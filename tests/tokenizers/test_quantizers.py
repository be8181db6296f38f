"""Every quantizer: ids and codes go both ways, gradients go where they must, padding and evaluation change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import straight_through
from mmdiff.tokenizers.quantizers.bsq import BSQ
from mmdiff.tokenizers.quantizers.fsq import FSQ
from mmdiff.tokenizers.quantizers.lfq import LFQ
from mmdiff.tokenizers.quantizers.simvq import SimVQ
from mmdiff.tokenizers.quantizers.vq import VQ

from .quantizing import EMA, each, fsq_preimage, gradients, made, quantise, same_bits

# Ids and codes


@each
def test_decode_gives_the_codes_bit_for_bit(quantizer):
    params, state, z = made(quantizer)
    out = quantise(quantizer, params, state, z, jax.random.key(0))
    assert out.codes.dtype == jnp.float32 and out.ids.dtype == jnp.int32 and out.loss.shape == ()
    decoded = jax.jit(quantizer.decode)(params, state, out.ids)
    assert same_bits(out.codes, decoded)
    if not isinstance(quantizer, FSQ | LFQ):
        usual = z + (decoded - z)
        assert not same_bits(usual, decoded)  # the usual form is the code only to a rounding


@each
def test_every_id_comes_back_the_last_one_too(quantizer):
    params, state, _ = made(quantizer)
    ids = jnp.arange(quantizer.size, dtype=jnp.int32)
    z = quantizer.decode(params, state, ids)
    assert len(np.unique(np.asarray(z), axis=0)) == quantizer.size
    z = fsq_preimage(quantizer, ids) if isinstance(quantizer, FSQ) else z
    np.testing.assert_array_equal(quantise(quantizer, params, state, z, train=False).ids, ids)


@each
def test_bf16_vectors_are_quantised_as_their_float32_values(quantizer):
    params, state, z = made(quantizer)
    z = 3 * jax.random.normal(jax.random.key(5), (4000, quantizer.width))
    rounded = z.astype(jnp.bfloat16)
    out, exact = (quantise(quantizer, params, state, x, train=False) for x in (rounded, rounded.astype(jnp.float32)))
    assert same_bits(out, exact)
    if not isinstance(quantizer, LFQ | BSQ):  # rounding never changes a sign
        assert np.any(out.ids != quantise(quantizer, params, state, z, train=False).ids)


@each
def test_size_width_and_bits(quantizer):
    assert quantizer.bits == pytest.approx(math.log2(quantizer.size))
    assert hash(quantizer) == hash(type(quantizer)(**vars(quantizer)))
    assert made(quantizer)[2].shape[-1] == quantizer.width


# Gradients


def nonzero(tree) -> bool:
    return any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@each
def test_the_gradient_of_the_codes_reaches_the_encoder_alone(quantizer):
    params, state, z = gradients(quantizer, lambda out: (out.codes**2).sum())
    assert not nonzero(params) and not nonzero(state) and nonzero(z)


@each
def test_what_is_trained_gets_a_gradient_and_the_state_none(quantizer):
    params, state, _ = gradients(quantizer, lambda out: (out.codes**3).sum() + out.loss)
    assert not nonzero(state) and bool(params) == nonzero(params)


@pytest.mark.parametrize("quantizer", EMA, ids=str)
def test_the_moving_average_hands_nothing_back(quantizer):
    _, state, z = gradients(quantizer, lambda out: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out.state)))
    assert not nonzero(state) and not nonzero(z)


@pytest.mark.parametrize("quantizer", [VQ(13, 4, normalise=False), SimVQ(13, 4), LFQ(5)], ids=str)
def test_the_straight_through_gradient_is_the_identity(quantizer):
    weights = jax.random.normal(jax.random.key(9), (6, 8, quantizer.width))
    assert same_bits(gradients(quantizer, lambda out: (weights * out.codes).sum())[2], weights)


def test_through_unit_length_the_gradient_is_that_of_the_direction():
    quantizer = VQ(13, 4)
    weights = jax.random.normal(jax.random.key(9), (6, 8, 4))
    seen = gradients(quantizer, lambda out: (weights * out.codes).sum())[2]
    z = made(quantizer)[2]
    np.testing.assert_allclose(seen, jax.vjp(codebook.unit, z)[1](weights)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((seen * z).sum(-1), 0, atol=1e-5)  # none along z


def test_straight_through_has_the_value_of_one_and_the_derivative_of_the_other():
    y, code = jnp.asarray([1.0, 2.0]), jnp.asarray([0.1, 0.3])
    value, change = jax.jvp(straight_through, (y, code), (jnp.asarray([5.0, 7.0]), jnp.asarray([100.0, 100.0])))
    np.testing.assert_array_equal(value, code)
    np.testing.assert_array_equal(change, [5.0, 7.0])


@pytest.mark.parametrize("make", [functools.partial(VQ, normalise=False, update="loss", restart=0), SimVQ])
def test_commitment_reaches_the_encoder_and_the_codebook_loss_the_codebook(make):
    params, _, z = gradients(make(13, 4, commitment=0.0), lambda out: out.loss)
    assert nonzero(params) and not nonzero(z)
    more_params, _, more_z = gradients(make(13, 4, commitment=0.5), lambda out: out.loss)
    np.testing.assert_allclose(*(jax.tree.leaves(p)[0] for p in (params, more_params)), rtol=1e-6)
    own_params, state, vectors = made(make(13, 4))
    code = quantise(make(13, 4), own_params, state, vectors).codes
    np.testing.assert_allclose(more_z, 0.5 * 2 * (vectors - code) / vectors.size, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("quantizer", EMA, ids=str)
def test_with_a_moving_average_the_loss_is_the_commitment(quantizer):
    params, state, z = made(quantizer)
    out = quantise(quantizer, params, state, z, train=False)
    z = codebook.unit(z) if quantizer.normalise else z
    np.testing.assert_allclose(out.loss, 0.25 * np.square(z - out.codes).mean(), rtol=1e-5)


# Padding, evaluation, keys


@each
def test_padding_changes_nothing(quantizer):
    params, state, z = made(quantizer)
    weight = jnp.asarray(np.random.default_rng(0).integers(0, 2, z.shape[:-1]), jnp.float32)
    garbage = jnp.where(weight[..., None] > 0, z, 50 + z)
    out, other = (quantise(quantizer, params, state, x, jax.random.key(1), weight=weight) for x in (z, garbage))
    assert same_bits((out.loss, out.state), (other.loss, other.state))
    if not isinstance(quantizer, FSQ):  # without weights the garbage shows
        assert out.loss != quantise(quantizer, params, state, garbage, jax.random.key(1)).loss


@each
def test_a_padded_batch_is_the_batch_without_padding(quantizer):
    quantizer = VQ(**vars(quantizer) | {"restart": 0}) if isinstance(quantizer, VQ) else quantizer  # donors differ
    params, state, z = made(quantizer)
    padded, weight = jnp.concatenate([z, 5 + z[:2]]), jnp.ones((8, 8)).at[6:].set(0)
    out, other = quantise(quantizer, params, state, z), quantise(quantizer, params, state, padded, weight=weight)
    np.testing.assert_allclose(other.loss, out.loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other.state, out.state)
    nothing = quantise(quantizer, params, state, padded, weight=jnp.zeros((8, 8)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((nothing.loss, nothing.state)))


@each
def test_evaluation_leaves_the_state_alone_and_the_same_key_gives_the_same_bits(quantizer):
    params, state, z = made(quantizer)
    assert same_bits(quantise(quantizer, params, state, z, train=False).state, state)
    first, again = (quantise(quantizer, params, state, z, jax.random.key(3)) for _ in range(2))
    assert same_bits(first, again)
    assert same_bits(first.state, state) == (quantizer not in EMA)


# Configuration


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VQ(1, 4), "VQ.size=1 must be at least 2"),
        (lambda: VQ(8, 0), "VQ.width=0 must be at least 1"),
        (lambda: VQ(8, 1), "use a larger width, normalise=False or LFQ"),
        (lambda: VQ(8, 4, decay=1.0), "VQ.decay=1.0 must be at least 0 and below 1"),
        (lambda: VQ(8, 4, commitment=-1), "VQ.commitment=-1 must not be negative"),
        (lambda: VQ(8, 4, restart=1.0), "VQ.restart=1.0 must be at least 0 "),
        (lambda: VQ(8, 4, gradient="ste"), "VQ.gradient='ste' is unknown; known: straight_through, rotation"),
        (lambda: VQ(8, 4, update="sgd"), "VQ.update='sgd' is unknown; known: ema, loss"),
        (lambda: VQ(8, 4, update="loss"), "with update='loss' set restart=0"),
        (lambda: SimVQ(1, 4), "SimVQ.size=1 must be at least 2"),
        (lambda: SimVQ(8, 0), "SimVQ.width=0 must be at least 1"),
        (lambda: SimVQ(8, 4, commitment=-1), "SimVQ.commitment=-1 must not be negative"),
        (lambda: FSQ(()), "FSQ.levels=() must be a tuple, for example (8, 6, 5)"),
        (lambda: FSQ([8, 5]), "FSQ.levels=[8, 5] must be a tuple"),
        (lambda: FSQ((8, 2)), "FSQ.levels=(8, 2) must each be at least 3; for two levels per value use LFQ"),
        (lambda: FSQ((1001,)), "use more values with fewer levels"),
        (lambda: FSQ((1000,) * 4), "more than int32 can number"),
        (lambda: LFQ(31), "LFQ.width=31 must be between 1 and 30"),
        (lambda: LFQ(0), "LFQ.width=0 must be between 1 and 30"),
        (lambda: LFQ(4, entropy=-1), "LFQ.entropy=-1 must not be negative"),
        (lambda: LFQ(4, commitment=-1), "LFQ.commitment=-1 must not be negative"),
        (lambda: BSQ(31), "BSQ.width=31 must be between 2 and 30"),
        (lambda: BSQ(1), "BSQ.width=1 must be between 2 and 30"),
        (lambda: BSQ(4, entropy=-1), "BSQ.entropy=-1 must not be negative"),
        (lambda: BSQ(4, commitment=-1), "BSQ.commitment=-1 must not be negative"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, says):
    with pytest.raises(ConfigError) as refused:
        make()
    assert says in str(refused.value) and "\n" not in str(refused.value)
