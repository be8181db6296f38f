"""Weights from safetensors: everything fits or the message names all that does not; parts go to their devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mmdiff.document import DataError
from mmdiff.pretrained import load


class Two(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)


RULES = [
    *load.layer(r"h\.(\d+)\.fc", "layers/{}"),
    *load.norm(r"ln", "norm"),
]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"h.0.fc.weight": (16, 8), "h.0.fc.bias": (16,), "h.1.fc.weight": (16, 8), "h.1.fc.bias": (16,)}
    shapes |= {"ln.weight": (16,), "ln.bias": (16,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def loaded(path, **options):
    return load.load_module(lambda: Two(nnx.Rngs(0)), path, RULES, **options)


def test_every_array_comes_to_its_place(arrays, tmp_path):
    save_file(arrays, tmp_path / "one.safetensors")
    model = loaded(tmp_path / "one.safetensors")
    for number in range(2):
        np.testing.assert_array_equal(model.layers[number].kernel[...], arrays[f"h.{number}.fc.weight"].T)
        np.testing.assert_array_equal(model.layers[number].bias[...], arrays[f"h.{number}.fc.bias"])
    np.testing.assert_array_equal(model.norm.scale[...], arrays["ln.weight"])
    assert loaded(tmp_path, dtype=jax.numpy.bfloat16).norm.bias[...].dtype == jax.numpy.bfloat16


def test_files_in_pieces_are_read_by_their_index(arrays, tmp_path):
    names = sorted(arrays)
    pieces = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, chosen in pieces.items():
        save_file({name: arrays[name] for name in chosen}, tmp_path / file)
    weight_map = {name: file for file, chosen in pieces.items() for name in chosen}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"stray": np.zeros(1)}, tmp_path / "other.safetensors")  # not in the index, not read
    np.testing.assert_array_equal(loaded(tmp_path).layers[1].kernel[...], arrays["h.1.fc.weight"].T)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(DataError, match="1 of its 2 files are not there: b.safetensors"):
        loaded(tmp_path)


def test_all_that_does_not_fit_is_told_at_once(arrays, tmp_path):
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["h.7.fc.bias"] = arrays.pop("h.1.fc.bias")
    arrays["ln.weight"] = np.zeros(15, np.float32)
    save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(DataError) as caught:
        loaded(tmp_path)
    told = str(caught.value)
    assert "2 without a place here: extra, h.7.fc.bias" in told
    assert "1 missing: layers/1/bias" in told
    assert "1 of another shape: ln.weight (15,) for norm/scale (16,)" in told
    with pytest.raises(DataError, match=f"^{tmp_path}: the weights do not fit: 1 without a place here: h.7.fc.bias; 1 missing"):
        loaded(tmp_path, ignored=["ext.a"])


def test_two_arrays_for_one_place_are_told(arrays, tmp_path):
    save_file(arrays, tmp_path / "w.safetensors")
    save_file({"ln.bias": arrays["ln.bias"]}, tmp_path / "w.fp16.safetensors")
    with pytest.raises(DataError, match="'ln.bias' is in more than one file"):
        loaded(tmp_path)
    save_file(arrays | {"old.bias": arrays["ln.bias"]}, tmp_path / "w.safetensors")
    rules = [*RULES, load.Rule(r"old\.bias", "norm/bias")]
    with pytest.raises(DataError, match="1 for the same place: ln.bias and old.bias for norm/bias"):
        load.load_module(lambda: Two(nnx.Rngs(0)), tmp_path / "w.safetensors", rules)


def test_what_is_no_safetensors_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        loaded(tmp_path / "none")
    with pytest.raises(DataError, match="holds no safetensors file; a .bin or .pth must be converted"):
        loaded(tmp_path)
    with pytest.raises(DataError, match="config.json: not there; it says the sizes"):
        load.load_folder(lambda cfg, rngs: Two(rngs), tmp_path, RULES, lambda told, where: told)
    (tmp_path / "config.json").write_text("{sizes")
    with pytest.raises(DataError, match="config.json is no JSON"):
        load.load_folder(lambda cfg, rngs: Two(rngs), tmp_path, RULES, lambda told, where: told)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04not this")
    with pytest.raises(DataError, match="x.safetensors is no safetensors file"):
        loaded(tmp_path)


def test_fused_weights_are_taken_apart():
    fused = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    parts = [load.part(number, 3, load.transposed)(fused) for number in range(3)]
    assert [a.shape for a in parts] == [(2, 2)] * 3
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), fused.T)


ON_EIGHT = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mmdiff.pretrained.llama import load_llama
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
cut = lambda path, shape: NamedSharding(mesh, PartitionSpec("fsdp") if shape[0] % 8 == 0 else PartitionSpec())
split, whole = load_llama(sys.argv[1], place=cut), load_llama(sys.argv[1])
kernel = split.layers[0].q.kernel[...]
ids = np.arange(12).reshape(2, 6)
logits = [np.asarray(model.logits(model(model.embed(ids))[0])) for model in (split, whole)]
shards = [shard.data.shape for shard in kernel.addressable_shards]
same = bool((np.asarray(kernel) == np.asarray(whole.layers[0].q.kernel[...])).all())
print(json.dumps({"shards": shards, "same": same, "difference": float(np.abs(logits[0] - logits[1]).max())}))
"""


def test_each_device_gets_its_part_only():
    folder = Path(__file__).parents[1] / "golden" / "pretrained" / "llama"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["shards"] == [[3, 24]] * 8 and told["same"] and told["difference"] < 1e-4
