"""U-Net, U-ViT and DiT: against numpy, image by image, with their memory and their sizes as written down."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff import config
from mmdiff.config import Config, ConfigError, Data, Layout, Mesh, Model, Optimizer
from mmdiff.layout import patchify
from mmdiff.models import transfusion
from mmdiff.models.image_layers import Conv
from mmdiff.models.matching import matched, parameter_count
from mmdiff.models.network import Network
from mmdiff.parallel.sharding import NOWHERE
from mmdiff.training.flops import counted_flops, training_flops

from . import rivals_by_hand

TOLERANCE = 1e-5
SIZE = 16, 32  # height and width: one resolution of the U-Net without attention, one with
SHAPES = {
    "unet": {"width": 8, "depth": 1, "channels": (1, 2), "head_width": 8},
    "uvit": {"width": 48, "depth": 3, "head_width": 16},
    "dit": {"width": 48, "depth": 2, "head_width": 16},
}
RIVALS = list(SHAPES)
SWAPPED = {  # a layer, and the axis of its kernel along which two inputs or outputs lie side by side
    "unet": (("up", "32_1", "residual", "straight"), 0),
    "uvit": (("blocks", "skips"), 1),
    "dit": (("modulation",), 1),
}


def experiment(kind: str, size=SIZE, **model) -> Config:
    model = {"patch": 4, "lossless": kind == "unet", "compute": "float32"} | SHAPES[kind] | model
    count = size[0] * size[1] // model["patch"] ** 2
    return Config(
        model=Model(network=kind, **model),
        layout=Layout(row_length=2 * count, markers=False),
        data=Data(image_size=size),
    )


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


def conv_size(inputs, outputs):
    return 9 * inputs * outputs + outputs


def block_size(inputs, outputs, time):
    straight = 0 if inputs == outputs else (inputs + 1) * outputs
    norms, modulation = 2 * inputs + 2 * outputs, (time + 1) * 2 * outputs
    return norms + modulation + conv_size(inputs, outputs) + conv_size(outputs, outputs) + straight


def test_parameters_are_as_many_as_published_layers_have():
    d, values, time = 384, 192, 33
    dit = 12 * (18 * d**2 + 15 * d) + (values + 1) * d + (time + 1) * d + (d + 1) * d + 2 * (d + 1) * d + (d + 1) * values
    assert parameter_count(experiment("dit", (64, 64), width=d, depth=12, patch=8, head_width=64)) == dit
    assert 0.95 < dit / 33e6 < 1.05  # DiT-S/8, arXiv 2212.09748 table 4
    d, values = 512, 48
    ends = (values + 1) * d + (time + 1) * 4 * d + (4 * d + 1) * d + 257 * d + 2 * d + (d + 1) * values + conv_size(3, 3)
    uvit = 13 * (12 * d**2 + 10 * d) + 6 * (2 * d + 1) * d + ends
    assert parameter_count(experiment("uvit", (64, 64), width=d, depth=13, head_width=64)) == uvit
    assert 0.95 < uvit / 44e6 < 1.05  # U-ViT-S/4, arXiv 2209.12152 table 1
    w, attend = 128, lambda c: 2 * c + 4 * (c + 1) * c
    channels = [w, 2 * w, 2 * w]
    size = (time + 1) * 4 * w + (4 * w + 1) * 4 * w + conv_size(3, w) + 2 * w + conv_size(w, 3)
    left, now = [w], w
    for side, c in zip((64, 32, 16), channels, strict=True):
        for _ in range(2):
            size += block_size(now, c, 4 * w) + (attend(c) if side == 16 else 0)
            now = c
            left.append(c)
        if side > 16:
            size += conv_size(c, c)
            left.append(c)
    size += 2 * block_size(now, now, 4 * w) + attend(now)
    for side, c in zip((16, 32, 64), channels[::-1], strict=True):
        for _ in range(3):
            size += block_size(now + left.pop(), c, 4 * w) + (attend(c) if side == 16 else 0)
            now = c
        size += conv_size(c, c) if side < 64 else 0
    assert parameter_count(experiment("unet", (64, 64), width=w, depth=2, channels=(1, 2, 2))) == size


def test_widths_are_found_that_match_a_number_of_parameters():
    dit = experiment("dit", width=48, depth=12, head_width=16)
    found = matched(dit, 1_000_000)
    counts = [
        parameter_count(dataclasses.replace(dit, model=dataclasses.replace(dit.model, width=w))) for w in range(32, 128, 16)
    ]
    assert parameter_count(found) == min(counts, key=lambda c: abs(np.log(c / 1e6))) and found.model.width % 16 == 0
    assert dataclasses.replace(found, model=dit.model) == dit  # nothing else has changed
    assert matched(experiment("unet"), 1_200_000).model.width == 40
    with pytest.raises(ConfigError, match=r"no model\.width .* gives 1000 parameters: model\.width=16 has \d+\. Lower .*head"):
        matched(dit, 1000)


def test_operations_of_convolutions_and_of_a_whole_step():
    conv = lambda stride: Conv(8, 24, nnx.Rngs(params=0), NOWHERE, stride=stride)
    x = jnp.zeros((2, 16, 32, 8))
    assert counted_flops(conv(1), x) == 2 * 9 * 8 * 24 * 2 * 16 * 32
    assert counted_flops(conv(2), x) == 2 * 9 * 8 * 24 * 2 * 8 * 16
    cfg = experiment("dit")
    d, t, images = 48, 32, 2 * cfg.training.batch_size
    per_image = t * (2 * 48 * d + 2 * (12 * d**2 + 2 * t * d)) + 33 * d + d**2 + 2 * 6 * d**2 + 2 * d**2
    assert training_flops(cfg, 300) == 3 * 2 * images * per_image


REFUSED = [
    ("dit", {"rope": "none"}, r"model\.rope='none' has no meaning with model\.network='dit'; leave it at .*'axial'"),
    ("uvit", {"skip": "concat"}, r"model\.skip='concat' has no meaning"),
    ("dit", {"channels": (1, 2)}, r"model\.channels=\(1, 2\) has no meaning"),
    ("unet", {"lossless": False}, r"model\.lossless=False has no meaning"),
    ("dit", {"lossless": True, "width": 32}, r"model\.width=32 cannot hold a 4x4 patch losslessly"),
    ("dit", {"width": 40}, r"model\.width=40 is not a multiple of model\.head_width=16"),
    ("unet", {"width": 12}, r"model\.width=12 must be a multiple of 8"),
    ("unet", {"channels": (1, 1, 1, 1, 1, 1)}, r"an image of 16x32 cannot be halved 5 times: .* must be multiples of 32"),
    *[
        (kind, {name: value}, rf"model\.{name}=.* has no meaning with model\.network='{kind}'")
        for kind in RIVALS
        for name, value in {
            "block": "attention",
            "places": "learned",
            "bottleneck": 16,
            "patch_head": "conv",
            "overlap": 1,
            "time": "adaln",
            "qk_norm": True,
            "bias": True,
        }.items()
    ],
]


@pytest.mark.parametrize(("kind", "model", "message"), REFUSED, ids=[f"{kind}-{list(model)}" for kind, model, _ in REFUSED])
def test_what_a_rival_cannot_honour_is_refused_in_one_line(kind, model, message):
    with pytest.raises(ConfigError) as refused:
        experiment(kind, **model)
    assert re.search(message, str(refused.value)) and "\n" not in str(refused.value)


def test_what_surrounds_a_rival_must_suit_it():
    unet = experiment("unet")
    for change, message in (
        ({"layout": Layout(row_length=64)}, r"layout\.markers=False"),
        ({"data": Data()}, r"set data\.image_size"),
        ({"layout": Layout(row_length=48, markers=False)}, r"row_length=48 must be a multiple of the 32 patches"),
        ({"optimizer": Optimizer(name="muon")}, r"optimizer\.name='muon' .* use 'adamw' or 'lamb'"),
        ({"mesh": Mesh(tensor=2)}, r"split by rows only"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            dataclasses.replace(unet, **change)
