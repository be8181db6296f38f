"""Stable Diffusion's networks with the weights of others compute what theirs do: golden files of small ones (sd_peers.py).

Where PyTorch and diffusers are installed, other seeds and settings are tried too.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_peers
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmdiff.document import DataError
from mmdiff.pretrained.sd_layers import WEIGHTS, Down
from mmdiff.pretrained.sd_unet import load_unet, sinusoids
from mmdiff.pretrained.sd_vae import load_vae

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrained"
LOADERS = {"sd_unet": load_unet, "sd_vae": load_vae}


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=["golden", "anew"])
def made(request, tmp_path):
    """kind -> (folder with weights, what the peer computed with them)."""

    def find(kind: str) -> tuple[Path, dict[str, np.ndarray]]:
        return opened(GOLDEN / kind) if request.param == "golden" else anew(tmp_path, kind, 1)

    return find


def anew(tmp_path: Path, kind: str, seed: int, **other) -> tuple[Path, dict[str, np.ndarray]]:
    pytest.importorskip("diffusers", reason="needs PyTorch and diffusers")
    sd_peers.PEERS[kind](tmp_path / kind, seed, **other)
    return opened(tmp_path / kind)


def opened(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    with np.load(folder / "expected.npz") as file:
        return folder, dict(file)


run = nnx.jit(lambda model, *given: model(*given))
encode, decode = nnx.jit(lambda model, images: model.encode(images)), nnx.jit(lambda model, latents: model.decode(latents))


def close(ours: jax.Array, theirs: np.ndarray) -> bool:
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


def test_unet(made):
    folder, expected = made("sd_unet")
    latents, times, context, mask = (expected[name] for name in ("latents", "times", "context", "mask"))
    model, everything = load_unet(folder), np.ones_like(mask)
    assert close(run(model, latents, times, context, everything), expected["noise"])
    assert close(run(model, latents, times, context, mask), expected["noise_masked"])
    assert close(run(model, expected["odd"], times, context), expected["noise_odd"])

    assert not close(run(model, latents, times + 1, context, everything), expected["noise"])
    assert not close(run(model, latents, times, context[::-1], everything), expected["noise"])
    assert not close(run(model, latents[:, :, ::-1], times, context, everything), expected["noise"])
    assert not close(run(model, latents, times, context, mask[::-1]), expected["noise_masked"])
    unread = np.where(mask[..., None], context, 9.0).astype(np.float32)
    assert close(run(model, latents, times, unread, mask), expected["noise_masked"])
    assert not close(run(model, latents, times, unread, everything), expected["noise"])


def test_unet_of_other_settings(tmp_path):
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 12), "layers_per_block": 2, "attention_head_dim": (2, 3), "use_linear_projection": True}
    folder, expected = anew(tmp_path, "sd_unet", 2, **kinds, **sizes, flip_sin_to_cos=False, freq_shift=1)
    model, given = load_unet(folder), [expected[name] for name in ("latents", "times", "context")]
    assert close(run(model, *given), expected["noise"])
    assert close(sinusoids(expected["times"], 320, flip=False, shift=1), expected["sinusoids"])
    model.flip = True
    assert not close(run(model, *given), expected["noise"])


def test_sinusoids_of_the_full_width(made):
    _, expected = made("sd_unet")
    assert close(sinusoids(expected["times"], 320), expected["sinusoids"])
    assert not close(sinusoids(expected["times"], 320, flip=False), expected["sinusoids"])
    assert not close(sinusoids(expected["times"], 320, shift=1), expected["sinusoids"])


@pytest.mark.parametrize("norm", ["block", "transformer"])
def test_epsilons_of_the_unet_are_seen(norm):
    folder, expected = opened(GOLDEN / "sd_unet")
    model = load_unet(folder)
    level = model.down[0]
    changed = level.blocks[0].norm_first if norm == "block" else level.attentions[0].norm_in
    changed.epsilon = 1e-6 if norm == "block" else 1e-5
    assert not close(run(model, expected["latents"], expected["times"], expected["context"]), expected["noise"])


def test_vae(made):
    folder, expected = made("sd_vae")
    model = load_vae(folder)
    mean, log_variance = encode(model, expected["images"])
    assert close(mean, expected["mean"]) and close(log_variance, expected["log_variance"])
    assert close(decode(model, expected["latents"]), expected["decoded"])
    assert model.scaling_factor == 0.3

    assert not close(encode(model, expected["images"][:, :, ::-1])[0], expected["mean"])
    assert not close(decode(model, expected["latents"][::-1]), expected["decoded"])
    halving = next(each for _, each in nnx.iter_graph(model.encoder) if isinstance(each, Down))
    halving.conv.padding = ((1, 0), (1, 0))
    assert not close(encode(model, expected["images"])[0], expected["mean"])


@pytest.mark.parametrize("norm", ["encoder", "block", "attention"])
def test_epsilons_of_the_vae_are_seen(norm):
    folder, expected = opened(GOLDEN / "sd_vae")
    model = load_vae(folder)
    middle = model.decoder.middle
    norms = {"encoder": model.encoder.levels[0].blocks[0], "block": middle.blocks[0], "attention": middle.attention}
    changed = norms[norm].norm if norm == "attention" else norms[norm].norm_first
    changed.epsilon = 1e-5
    if norm == "encoder":
        assert not close(encode(model, expected["images"])[0], expected["mean"])
    else:
        assert not close(decode(model, expected["latents"]), expected["decoded"])


def test_half_precision_stays_half():
    folder, expected = opened(GOLDEN / "sd_unet")
    latents, context = (jnp.asarray(expected[name], jnp.bfloat16) for name in ("latents", "context"))
    noise = lambda dtype: nnx.eval_shape(load_unet(folder, dtype=dtype), latents, expected["times"], context)
    assert noise(jnp.bfloat16).dtype == jnp.bfloat16
    assert noise(jnp.float32).dtype == jnp.float32


def copied(kind: str, tmp_path: Path, renamed: dict[str, str | None]) -> Path:
    """A folder with parts of names replaced; None: without the weights that have the part."""
    folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / "copy"))
    weights = load_file(folder / WEIGHTS)
    for old, new in renamed.items():
        assert any(old in name for name in weights)
        kept = {name: array for name, array in weights.items() if new is not None or old not in name}
        weights = {name.replace(old, new or ""): array for name, array in kept.items()}
    save_file(weights, folder / WEIGHTS)
    return folder


def test_older_names_of_the_vae(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder = copied("sd_vae", tmp_path, {f"attentions.0.{new}": f"attentions.0.{name}" for new, name in old.items()})
    model, (_, expected) = load_vae(folder), opened(folder)
    assert close(encode(model, expected["images"])[0], expected["mean"])
    assert close(decode(model, expected["latents"]), expected["decoded"])


def test_full_weights_are_taken_where_others_lie_beside(tmp_path):
    folder = copied("sd_vae", tmp_path, {})
    halved = {name: array / 2 for name, array in load_file(folder / WEIGHTS).items()}
    save_file(halved, folder / "z.safetensors")
    expected = opened(folder)[1]
    assert close(decode(load_vae(folder), expected["latents"]), expected["decoded"])
    (folder / WEIGHTS).unlink()
    assert not close(decode(load_vae(folder), expected["latents"]), expected["decoded"])


@pytest.mark.parametrize(
    ("kind", "name", "ours"),
    [
        ("sd_unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "up/1/attentions/0/cross/k/kernel"),
        ("sd_unet", "mid_block.resnets.1.norm2.bias", "middle/blocks/1/norm_second/bias"),
        ("sd_vae", "encoder.down_blocks.1.downsamplers.0.conv.weight", "encoder/levels/1/resample/conv/kernel"),
    ],
)
def test_misfits_are_told(kind, name, ours, tmp_path):
    with pytest.raises(DataError, match=f"fit: 1 missing: {ours}"):
        LOADERS[kind](copied(kind, tmp_path / "removed", {name: None}))
    with pytest.raises(DataError, match=f"fit: 1 without a place here: {name}s; 1 missing: {ours}"):
        LOADERS[kind](copied(kind, tmp_path / "renamed", {name: f"{name}s"}))


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("sd_unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("sd_unet", {"up_block_types": ["UpBlock2D"]}, "different lengths"),
        ("sd_unet", {"layers_per_block": [1, 1, 1]}, "layers_per_block"),
        ("sd_unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep' "),
        ("sd_vae", {"_class_name": "VQModel"}, "VQModel"),
        ("sd_vae", {"use_quant_conv": False}, "use_quant_conv=False"),
    ],
)
def test_unsupported_settings_are_told_in_a_line(kind, setting, message, tmp_path):
    folder = copied(kind, tmp_path, {})
    cfg = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(cfg | setting))
    with pytest.raises(DataError, match=f"config.json: not supported: .*{message}") as error:
        LOADERS[kind](folder)
    assert "\n" not in str(error.value)
