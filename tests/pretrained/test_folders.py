"""Folders as they are found: with values left out, of other networks, damaged, of a vision tower alone."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmdiff.config import Tower
from mmdiff.document import DataError
from mmdiff.pretrained.blip2 import load_blip2_vision, read_blip2_vision
from mmdiff.pretrained.clip import CLIP, clip_config, load_clip, load_clip_vision, read_clip_vision
from mmdiff.pretrained.encoder import USUAL
from mmdiff.pretrained.llama import Llama, load_llama
from mmdiff.pretrained.load import save_module
from mmdiff.pretrained.t5 import load_t5_decoder
from mmdiff.tokenizers.tower import read_sizes

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrained"
LOAD = {"clip": load_clip, "blip2": load_blip2_vision, "llama": load_llama, "t5": load_t5_decoder, "vision": load_clip_vision}
BLIP2 = {  # Salesforce/blip2-opt-2.7b
    "model_type": "blip-2",
    "text_config": {"model_type": "opt"},
    "vision_config": {
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "model_type": "blip_2_vision_model",
        "num_channels": 3,
        "projection_dim": 512,
    },
}
FEW = {"num_hidden_layers": 1}  # the usual number takes long to make
BASE = {  # a CLIP of the usual sizes
    "model_type": "clip",
    "text_config": {"model_type": "clip_text_model"},
    "vision_config": {"model_type": "clip_vision_model"},
}


def config_of(kind: str):
    return json.loads((GOLDEN / kind / "config.json").read_text())


def folder_of(kind: str, folder: Path, cfg, change=lambda weights: weights) -> Path:
    """The golden folder with another config.json and other weights."""
    shutil.copytree(GOLDEN / kind, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def refused(load, folder: Path, told: str):
    with pytest.raises(DataError, match=told) as problem:
        load(folder)
    assert "\n" not in str(problem.value) and str(folder) in str(problem.value)


def parameters(module: nnx.Module):
    return jax.tree.leaves(nnx.state(module, nnx.Param))


def test_values_left_out_are_the_usual_ones(tmp_path):
    found = read_blip2_vision(folder_of("blip2", tmp_path / "blip2", BLIP2))
    assert (found["image_size"], found["patch_size"], found["hidden_size"], found["num_hidden_layers"]) == (224, 14, 1408, 39)
    few = BLIP2 | {"vision_config": BLIP2["vision_config"] | FEW}
    small = folder_of("blip2", tmp_path / "small", few)
    refused(load_blip2_vision, small, r"patches/kernel \(14, 14, 3, 1408\)")  # only the weights are too small
    clip = folder_of("clip", tmp_path / "clip", BASE)
    tower = Tower(side=224, patch=32, width=768, hidden=3072, depth=12, heads=12, embedding=512)
    assert read_sizes(str(clip)) == tower
    folder_of("clip", clip, BASE | {name: BASE[name] | FEW for name in ("text_config", "vision_config")})
    refused(load_clip, clip, r"text/embedding \(49408, 512\)")
    refused(load_clip_vision, clip, r"patches/kernel \(32, 32, 3, 768\)")
    for kind in ("clip", "blip2"):
        cfg = config_of(kind)
        told = cfg["text_config"] if kind == "clip" else cfg
        for name in ("hidden_act", "layer_norm_eps"):
            del told[name]
        again = LOAD[kind](folder_of(kind, tmp_path / f"less {kind}", cfg))
        assert nnx.graphdef(again) == nnx.graphdef(LOAD[kind](GOLDEN / kind))
    assert CLIP(config_of("clip"), nnx.Rngs(0)).text.norm.epsilon == 1e-5


def test_usual_values_are_those_of_the_package():
    transformers = pytest.importorskip("transformers", reason="needs transformers: the extra `parity`")
    made = (transformers.CLIPVisionConfig(), transformers.CLIPTextConfig(), transformers.Blip2VisionConfig())
    for theirs in made:
        assert {name: getattr(theirs, name) for name in USUAL[theirs.model_type]} == USUAL[theirs.model_type]
    assert transformers.CLIPConfig().projection_dim == clip_config(BASE)["projection_dim"]


def test_a_part_that_no_t5_reads_is_left_alone(tmp_path):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = lambda weights: weights | {name: np.ones((8, 2), np.float32)}
    found = load_t5_decoder(folder_of("t5", tmp_path / "t5", config_of("t5"), more))
    for one, two in zip(parameters(found), parameters(load_t5_decoder(GOLDEN / "t5")), strict=True):
        np.testing.assert_array_equal(one, two)
    other = lambda weights: weights | {name.replace("block.0", "block.1"): np.ones((8, 2), np.float32)}
    refused(load_t5_decoder, folder_of("t5", tmp_path / "other", config_of("t5"), other), "1 without a place here")


@pytest.mark.parametrize("kind", LOAD)
def test_folders_of_other_networks_are_told(kind, tmp_path):
    """Also those that do not say what they are: written by `save_module`, or by hand."""
    for other in ("clip", "blip2", "llama", "t5"):
        if other != kind and (kind, other) != ("vision", "clip"):
            refused(LOAD[kind], folder_of(other, tmp_path / other, config_of(other)), "not supported: .*model_type='")
            cfg = {name: value for name, value in config_of(other).items() if name != "model_type"} | FEW
            refused(LOAD[kind], folder_of(other, tmp_path / other, cfg), "not supported: |the weights do not fit: ")
    without = {"vision_config": None, "text_config": [], "d_model": "16"}
    for damaged in ([1], FEW, FEW | {"format": "mmdiff", "tokens": 8}, without):
        refused(
            LOAD[kind], folder_of("llama", tmp_path / "llama", damaged), "config.json(: not| holds no)|the weights do not fit"
        )


@pytest.mark.parametrize(
    ("kind", "inside", "changes", "told"),
    [
        ("clip", "text_config", {"hidden_act": "mish"}, r"config.json: text_config: not supported: hidden_act='mish' \(only"),
        ("clip", "vision_config", {"hidden_act": "mish"}, "vision_config: not supported: hidden_act='mish'"),
        ("vision", "vision_config", {"hidden_act": "mish"}, "vision_config: not supported: hidden_act='mish'"),
        ("clip", "vision_config", {"model_type": "siglip_vision_model"}, "model_type='siglip_vision_model'"),
        ("clip", "vision_config", {"hidden_size": None}, "vision_config: not supported: hidden_size=None"),
        ("blip2", None, {"hidden_act": "mish"}, "config.json: not supported: hidden_act='mish'"),
        ("t5", None, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj='gated-mish'"),
        ("t5", None, {"d_kv": None}, "d_kv=None"),
        ("llama", None, {"hidden_act": "gelu"}, r"hidden_act='gelu' \(only 'silu'"),
        ("llama", None, {"model_type": "mistral"}, r"model_type='mistral' \(only 'llama'\)"),
        ("llama", None, {"sliding_window": 4096}, "sliding_window=4096"),
        ("llama", None, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", None, {"attention_bias": True}, "attention_bias=True"),
        ("llama", None, {"rope_scaling": {"factor": 2.0}}, "rope_scaling: not supported: factor=2.0"),
        ("llama", None, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type='linear'"),
        (
            "llama",
            None,
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_parameters: .*rope_type='llama3'",
        ),
        ("llama", None, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: .*partial_rotary_factor=0.5"),
        ("llama", None, {"rope_scaling": [2]}, r"rope_scaling=\[2\]"),
    ],
)
def test_what_is_not_computed_is_refused(kind, inside, changes, told, tmp_path):
    source = "clip" if kind == "vision" else kind
    cfg = config_of(source)
    (cfg[inside] if inside else cfg).update(changes)
    refused(LOAD[kind], folder_of(source, tmp_path / kind, cfg), told)
    if kind == "llama":
        with pytest.raises(DataError, match="config.json"):
            Llama(cfg, nnx.Rngs(0))


def test_what_changes_nothing_is_not_refused(tmp_path):
    cfg = config_of("llama") | {"rope_scaling": None, "sliding_window": None, "partial_rotary_factor": 1.0}
    load_llama(folder_of("llama", tmp_path / "llama", cfg))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_told(index, tmp_path):
    folder = folder_of("t5", tmp_path / "t5", config_of("t5"))
    (folder / "model.safetensors.index.json").write_text(index)
    refused(load_t5_decoder, folder, r"model\.safetensors\.index\.json (is no JSON|holds no JSON object|has no weight_map)")


def test_a_vision_tower_alone_is_the_half_of_a_whole(tmp_path):
    with np.load(GOLDEN / "clip" / "expected.npz") as file:
        images, patches = file["images"], file["patches"]
    alone = lambda weights: {name: array for name, array in weights.items() if name.startswith("vision_model.")}
    whole = load_clip(GOLDEN / "clip")
    save_module(whole, tmp_path / "ours", {**config_of("clip"), "model_type": "clip"})
    folders = [
        folder_of("clip", tmp_path / "flat", config_of("clip")["vision_config"], alone),
        folder_of("clip", tmp_path / "nested", config_of("clip"), alone),
        GOLDEN / "clip",
        tmp_path / "ours",
    ]
    for folder in folders:
        model = load_clip_vision(folder)
        for one, two in zip(parameters(model), parameters(whole.vision), strict=True):
            np.testing.assert_array_equal(one, two)
        assert read_clip_vision(folder)["hidden_size"] == 24
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model(images), patches, atol=1e-3)
    refused(load_clip, folders[0], "text_config=None; vision_config=None; .*model_type='clip_vision_model'")
    less = lambda weights: {name: array for name, array in alone(weights).items() if "pre_layrnorm" not in name}
    refused(load_clip_vision, folder_of("clip", tmp_path / "less", config_of("clip"), less), "2 missing: norm_first")
