"""U-Net, U-ViT and DiT: against numpy, image by image, forwards, scanned, in bfloat16, and with less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.layout import patchify
from mmdiff.models import transfusion
from mmdiff.models.network import Network
from mmdiff.training.flops import counted_flops

from . import rivals_by_hand
from .tiny_rivals import RIVALS, SIZE, experiment

TOLERANCE = 1e-5
SWAPPED = {  # a layer, and the axis of its kernel along which two inputs or outputs lie side by side
    "unet": (("up", "32_1", "residual", "straight"), 0),
    "uvit": (("blocks", "skips"), 1),
    "dit": (("modulation",), 1),
}


@functools.cache
def network_and_fresh(kind: str):
    network = Network.of(experiment(kind), 300)
    return network, jax.jit(network.init)(jax.random.key(0))


@functools.cache
def network_and_params(kind: str):
    """With parameters none of which is zero."""
    network, params = network_and_fresh(kind)
    rng = np.random.default_rng(4)
    return network, jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)


@functools.partial(jax.jit, static_argnames="network")
def predict(network, params, z, u):
    """Rows of patches z [b, t, p] at times u [b, t]."""
    model = network.bind(params)
    return model.predict(model.hidden(None, None, z, u, None, None, None), None)


@functools.partial(jax.jit, static_argnames="network")
def predict_images(network, params, z, u):
    return network.bind(params).network(z, u)


@pytest.fixture(scope="module")
def noisy():
    """Two images of random numbers, and their times."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, *SIZE, 3)).astype(np.float32), np.asarray([0.3, 0.8], np.float32)


@pytest.mark.parametrize("kind", RIVALS)
def test_forward_equals_numpy(kind, noisy):
    z, u = noisy
    network, params = network_and_params(kind)
    ours = np.asarray(predict_images(network, params, z, u))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params["network"])
    by_hand = lambda exact, u: getattr(rivals_by_hand, kind)(exact, z.astype(np.float64), u.astype(np.float64), network.cfg)
    expected = by_hand(exact, u)
    error = lambda expected: np.abs(ours - expected).max() / np.abs(expected).max()
    assert ours.shape == z.shape and ours.dtype == np.float32
    assert error(expected) < TOLERANCE
    # controls: another time, and a layer that looks at its inputs the other way round
    assert error(by_hand(exact, u + 0.1)) > 100 * TOLERANCE
    path, axis = SWAPPED[kind]
    layer = functools.reduce(dict.__getitem__, path, exact)
    layer["kernel"] = np.flip(layer["kernel"], axis)
    assert error(by_hand(exact, u)) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", RIVALS)
def test_the_output_starts_at_zero(kind, noisy):
    network, fresh = network_and_fresh(kind)
    assert jnp.all(predict_images(network, fresh, *noisy) == 0)
    assert jnp.all(predict_images(*network_and_params(kind), *noisy).std((1, 2)) > 0)


@pytest.mark.parametrize("kind", RIVALS)
def test_images_of_rows_know_nothing_of_each_other(kind, noisy):
    """Two rows of two images and half an image, which is padding."""
    network, params = network_and_params(kind)
    rng = np.random.default_rng(1)
    patches = lambda images: np.stack([patchify(image, 4) for image in images])
    z, u = rng.standard_normal((2, 80, 48)).astype(np.float32), rng.uniform(size=(2, 80)).astype(np.float32)
    z[0, :64], u[0, [0, 32]] = patches(noisy[0]).reshape(64, 48), noisy[1]
    whole = predict(network, params, z, u)
    scale = jnp.abs(whole).max()
    alone = patches(predict_images(network, params, *noisy)).reshape(64, 48)
    assert whole.shape == z.shape and jnp.abs(whole[0, :64] - alone).max() < TOLERANCE * scale
    z[0, 32:], u[0, 32:], z[1], u[1] = 0, 0.5, 1, 0.25
    other = predict(network, params, z, u)
    assert jnp.all(other[0, :32] == whole[0, :32])
    assert jnp.abs(other[0, 32:64] - whole[0, 32:64]).max() > 100 * TOLERANCE * scale  # control


@pytest.mark.parametrize("kind", RIVALS)
def test_tangents(kind, noisy):
    """Few-step training differentiates forwards, in z and u."""
    z, u = noisy
    network, params = network_and_params(kind)
    direction = (np.random.default_rng(3).standard_normal(z.shape).astype(np.float32), np.ones_like(u))
    function = functools.partial(predict_images, network, params)
    _, tangent = jax.jit(lambda: jax.jvp(function, (z, u), direction))()
    at = lambda step: function(z + step * direction[0], u + step * direction[1])
    quotient = (at(1e-2) - at(-1e-2)) / 2e-2
    assert jnp.abs(tangent - quotient).max() < 2e-2 * jnp.abs(tangent).max()


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_scanned_layers_equal_unrolled_ones(kind, noisy, monkeypatch):
    network, params = network_and_params(kind)
    unrolled = predict_images(network, params, *noisy)
    monkeypatch.setattr(transfusion, "UNROLL_LIMIT", 0)
    scanned = jax.jit(lambda p: network.bind(p).network(*noisy))
    assert "scan" in str(jax.make_jaxpr(scanned)(params))
    assert jnp.abs(scanned(params) - unrolled).max() < TOLERANCE * jnp.abs(unrolled).max()


@pytest.mark.parametrize("kind", ["unet", "uvit"])
def test_memory_can_be_traded_for_time(kind, noisy):
    """Operations of a gradient: the more is recomputed, the more there are; the blocks of a U-Net keep convolutions."""
    counts = {}
    for remat in ("none", "dots", "full"):
        network = Network.of(experiment(kind, remat=remat), 300)
        params = jax.eval_shape(network.init, jax.random.key(0))
        loss = lambda p, network=network: jnp.sum(predict_images(network, p, *noisy) ** 2)
        counts[remat] = counted_flops(jax.grad(loss), params)
    assert counts["none"] <= counts["dots"] < counts["full"]
    assert counts["full"] < 1.4 * counts["none"]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_bfloat16_comes_near(kind, noisy):
    network, params = network_and_params(kind)
    exact = predict_images(network, params, *noisy)
    rough = predict_images(
        dataclasses.replace(network, cfg=dataclasses.replace(network.cfg, compute="bfloat16")), params, *noisy
    )
    assert rough.dtype == jnp.float32
    assert 1e-4 < jnp.sqrt(jnp.mean((rough - exact) ** 2) / jnp.mean(exact**2)) < 0.1


def test_the_unet_attends_at_16_and_8_and_in_the_middle():
    cfg = experiment("unet", (32, 64), channels=(1, 1, 2, 2, 2), depth=2)
    params = jax.eval_shape(Network.of(cfg, 0).init, jax.random.key(0))["network"]
    attending = {name for part in ("down", "up") for name, block in params[part].items() if "attend" in block}
    assert {name.split("_")[0] for name in attending} == {"16", "8"}
    assert {name.split("_")[0] for name in params["down"]} == {"64", "32", "16", "8", "4"}  # control
    assert "attention" in params["middle"]
