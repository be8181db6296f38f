"""How large the rivals are and what they cost, by formula; what they refuse."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.config import ConfigError, Data, Layout, Mesh, Model, Optimizer
from mmdiff.models.image_layers import Conv
from mmdiff.models.matching import matched, parameter_count
from mmdiff.parallel.sharding import NOWHERE
from mmdiff.training.flops import counted_flops, training_flops

from .tiny_rivals import RIVALS, experiment


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


OTHER = {  # a value that is not the default, for every field that a rival might ignore
    "block": "attention",
    "expansion": 3,
    "key_width": 64,
    "qk_norm": True,
    "bias": True,
    "rope": "none",
    "sparse": "strided",
    "rope_base": 10.0,
    "positions": "raster",
    "places": "learned",
    "skip": "concat",
    "bottleneck": 16,
    "overlap": 1,
    "patch_head": "conv",
    "tie_embeddings": True,
    "time": "adaln",
    "time_embedding": "table",
    "zero_head": False,
    "step_input": True,
}
REFUSED = [
    ("dit", {"rope": "none"}, r"model\.rope='none' has no meaning with model\.network='dit'; leave it at .*'axial'"),
    ("dit", {"channels": (1, 2)}, r"model\.channels=\(1, 2\) has no meaning"),
    ("unet", {"lossless": False}, r"model\.lossless=False has no meaning"),
    ("dit", {"lossless": True, "width": 32}, r"model\.width=32 cannot hold a 4x4 patch losslessly"),
    ("dit", {"width": 40}, r"model\.width=40 is not a multiple of model\.head_width=16"),
    ("unet", {"width": 12}, r"model\.width=12 must be a multiple of 8"),
    ("unet", {"channels": (1, 1, 1, 1, 1, 1)}, r"an image of 16x32 cannot be halved 5 times: .* must be multiples of 32"),
]


@pytest.mark.parametrize(("kind", "model", "message"), REFUSED, ids=[f"{kind}-{list(model)}" for kind, model, _ in REFUSED])
def test_what_a_rival_cannot_honour_is_refused_in_one_line(kind, model, message):
    with pytest.raises(ConfigError) as refused:
        experiment(kind, **model)
    assert re.search(message, str(refused.value)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", RIVALS)
def test_no_field_is_ignored(kind):
    honoured = {"network", "width", "depth", "patch", "head_width", "attention", "compute", "remat", "channels", "lossless"}
    assert {field.name for field in dataclasses.fields(Model)} == honoured | set(OTHER)
    for name, value in OTHER.items():
        with pytest.raises(ConfigError, match=rf"model\.{name}=.* has no meaning with model\.network='{kind}'; leave it at"):
            experiment(kind, **{name: value})


def test_what_surrounds_a_rival_must_suit_it():
    unet = experiment("unet")
    for change, message in (
        ({"layout": Layout(row_length=64)}, r"layout\.markers=False"),
        ({"data": Data()}, r"set data\.image_size"),
        ({"layout": Layout(row_length=48, markers=False)}, r"row_length=48 must be a multiple of the 32 patches"),
        ({"optimizer": Optimizer(name="muon")}, r"optimizer\.name='muon' .* use 'adamw' or 'lamb'"),
        ({"mesh": Mesh(tensor=2)}, r"split by rows only"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(unet, **change)
