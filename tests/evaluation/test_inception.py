"""Inception-v3: its parameters counted, its first layers in NumPy, the whole against torchvision's, and its weights' hash."""

import hashlib
import io
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.evaluation import inception
from mmdiff.evaluation.inception import EPSILON, PARTS, Inception, Layer, Unit, average_pool, fill, load, max_pool
from mmdiff.evaluation.state_dict import read_arrays


def units(model):
    return {".".join(map(str, path)): unit for path, unit in nnx.iter_graph(model) if isinstance(unit, Unit)}


def random_weights(seed=0):
    """A state dictionary in torchvision's names and order of axes; activations keep their size through the layers."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, unit in units(Inception()).items():
        height, width, inputs, outputs = unit.kernel.shape
        scale = np.sqrt(2 / (height * width * inputs))
        arrays[f"{name}.conv.weight"] = rng.standard_normal((outputs, inputs, height, width), np.float32) * np.float32(scale)
        for part in ("bn.weight", "bn.running_var"):
            arrays[f"{name}.{part}"] = rng.uniform(0.5, 1.5, outputs).astype(np.float32)
        for part in ("bn.bias", "bn.running_mean"):
            arrays[f"{name}.{part}"] = 0.1 * rng.standard_normal(outputs).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def model(weights):
    made = Inception()
    fill(made, weights)
    return made


def test_it_has_the_parameters_of_inception_v3_without_its_classifier():
    """23,834,568 is what torchvision counts without the auxiliary classifier; its last layer is 2048 x 1000 + 1000."""
    made = units(Inception())
    learnt = sum(np.prod(getattr(u, part).shape) for u in made.values() for part in ("kernel", "scale", "bias"))
    assert learnt == 23_834_568 - 2048 * 1000 - 1000
    assert len(made) == 94


def test_pictures_shrink_as_the_paper_says():
    """Input sizes of table 1 of arXiv 1512.00567."""
    model = Inception()
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    sizes = []
    for layer in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = jax.eval_shape(getattr(model, layer), x)
        sizes.append(x.shape[1:])
    assert sizes == [(149, 149, 32), (147, 147, 32), (147, 147, 64)]
    x = jax.ShapeDtypeStruct((1, 35, 35, 192), jnp.float32)
    sizes = []
    for layer in ("5b", "5c", "5d", "6a", "6b", "6e", "7a", "7b", "7c"):
        x = jax.eval_shape(getattr(model, f"Mixed_{layer}"), x)
        sizes.append(x.shape[1:])
    wide, small = (17, 17, 768), (8, 8, 2048)
    assert sizes == [(35, 35, 256), (35, 35, 288), (35, 35, 288), wide, wide, wide, (8, 8, 1280), small, small]
    whole = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32))
    assert whole.shape == (2, 2048)


def numpy_unit(x, arrays, name, stride, padding):
    """Convolution as a sum over the kernel's places, normalisation, relu; x [h, w, c]."""
    kernel = arrays[f"{name}.conv.weight"].astype(np.float64)
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    rows, cols = ((side - size) // stride + 1 for side, size in zip(x.shape, kernel.shape[2:], strict=False))
    y = np.zeros((rows, cols, len(kernel)))
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            y += x[i : i + stride * rows : stride, j : j + stride * cols : stride] @ kernel[:, :, i, j].T
    gain = arrays[f"{name}.bn.weight"] / np.sqrt(arrays[f"{name}.bn.running_var"] + EPSILON)
    return np.maximum((y - arrays[f"{name}.bn.running_mean"]) * gain + arrays[f"{name}.bn.bias"], 0)


def test_the_first_layers_are_those_of_numpy(model, weights):
    x = np.random.default_rng(0).uniform(-1, 1, (23, 27, 3))
    want = numpy_unit(x, weights, "Conv2d_1a_3x3", 2, 0)
    want = numpy_unit(want, weights, "Conv2d_2a_3x3", 1, 0)
    want = numpy_unit(want, weights, "Conv2d_2b_3x3", 1, 1)
    found = model.Conv2d_2b_3x3(model.Conv2d_2a_3x3(model.Conv2d_1a_3x3(jnp.asarray(x[None], jnp.float32))))
    np.testing.assert_allclose(found[0], want, atol=1e-5)
    assert want.max() > 1


def test_averages_leave_out_what_lies_outside():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 5, 2)), jnp.float32)
    found = average_pool(x)
    np.testing.assert_allclose(found[0, 0, 0], x[0, :2, :2].mean((0, 1)), rtol=1e-5)  # four places, not nine
    np.testing.assert_allclose(found[0, 1, 1], x[0, :3, :3].mean((0, 1)), rtol=1e-5)
    assert max_pool(x, 1).shape == x.shape and max_pool(x, 2).shape == (1, 1, 2, 2)


def test_it_agrees_with_torchvision_where_that_is_installed(model, weights):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch torchvision")
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torch torchvision")
    peer = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    peer.fc = torch.nn.Identity()
    missing = peer.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    assert not missing.unexpected_keys and all("num_batches" in name for name in missing.missing_keys)
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 48, 3)).astype(np.uint8)
    found = inception.features(model)(images)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128
    functional = torch.nn.functional
    x = functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        usual = peer(x).numpy()
    average = functional.avg_pool2d
    last = peer.Mixed_7c.forward

    def with_maximum(x):
        functional.avg_pool2d = lambda x, **how: functional.max_pool2d(x, **how)
        try:
            return last(x)
        finally:
            functional.avg_pool2d = fid_average

    fid_average = lambda x, **how: average(x, count_include_pad=False, **how)
    peer.Mixed_7c.forward = with_maximum
    functional.avg_pool2d = fid_average
    try:
        with torch.no_grad():
            want = peer(x).numpy()
    finally:
        functional.avg_pool2d = average
    scale = np.abs(want).max()
    assert np.abs(found - want).max() < 1e-4 * scale
    assert np.abs(usual - want).max() > 1e-2 * scale  # the variant matters


def zip_file(arrays, classes=("torch._utils", "_rebuild_tensor_v2"), offset=0):
    """What torch.save writes, by hand."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("weights/data.pkl", pickled(arrays, classes, offset))
        for number, value in enumerate(arrays.values()):
            archive.writestr(f"weights/data/{number}", value.tobytes())
    return out.getvalue()


def legacy_file(arrays):
    out = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    out += pickled(arrays, ("torch._utils", "_rebuild_tensor_v2"), 0)
    out += pickle.dumps([str(number) for number in range(len(arrays))], 2)
    return out + b"".join(np.int64(value.size).tobytes() + value.tobytes() for value in arrays.values())


def pickled(arrays, classes, offset) -> bytes:
    """A pickle that calls `classes` on a storage, as PyTorch's does, without PyTorch: opcodes of protocol 2."""
    name = lambda text: b"X" + len(text).to_bytes(4, "little") + text.encode()
    number = lambda value: b"J" + int(value).to_bytes(4, "little", signed=True)
    many = lambda values: b"(" + b"".join(map(number, values)) + b"t"
    out = b"\x80\x02}("
    for index, (key, value) in enumerate(arrays.items()):
        strides = [step // value.itemsize for step in value.strides]
        storage = (
            b"(" + name("storage") + b"ctorch\nFloatStorage\n" + name(str(index)) + name("cpu") + number(value.size) + b"tQ"
        )
        arguments = b"(" + storage + number(offset) + many(value.shape) + many(strides) + b"\x89}t"
        out += name(key) + f"c{classes[0]}\n{classes[1]}\n".encode() + arguments + b"R"
    return out + b"u."


ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([7.5])}


@pytest.mark.parametrize("write", [zip_file, legacy_file], ids=["zip", "legacy"])
def test_files_of_torch_are_read_without_torch(tmp_path, write):
    (tmp_path / "w.pth").write_bytes(write(ARRAYS))
    found = read_arrays(tmp_path / "w.pth")
    assert set(found) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_that_torch_wrote_are_read(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
    whole = torch.arange(24.0).reshape(2, 3, 4)
    saved = {"whole": whole, "part": whole[1:, 1:].transpose(1, 2), "half": whole.half(), "count": torch.tensor(3)}
    saved["parameter"] = torch.nn.Parameter(whole[0])
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = read_arrays(tmp_path / "w.pth")
    for name, value in saved.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy())


BAD_FILES = {
    "a class that would run": zip_file(ARRAYS, ("os", "system")),
    "beyond its storage": zip_file(ARRAYS, offset=3),
    "neither": b"not weights",
    "a pickle of something else": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_other_files_are_refused_in_one_line(tmp_path, what):
    (tmp_path / "w.pth").write_bytes(BAD_FILES[what])
    with pytest.raises(DataError, match="no state dictionary") as refused:
        read_arrays(tmp_path / "w.pth")
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(tmp_path / "absent.pth")


def test_weights_are_taken_only_by_their_hash(tmp_path, weights):
    path = tmp_path / "w.npz"
    np.savez(path, **weights)
    hash_of = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(config.ConfigError, match=f"--weights-sha256 {hash_of}"):
        load(path)
    with pytest.raises(config.ConfigError, match="is not the one asked for"):
        load(path, "0" * 64)
    loaded = load(path, hash_of.upper())
    assert (loaded.name, loaded.digest, loaded.width) == ("inception", hash_of[:16], 2048)


def test_weights_of_another_network_are_refused(weights):
    name = "Mixed_6b.branch7x7_2"
    with pytest.raises(DataError, match=f"hold no '{name}.bn.bias'"):
        fill(Inception(), {key: value for key, value in weights.items() if key != f"{name}.bn.bias"})
    swapped = {key: v.swapaxes(2, 3) if key == f"{name}.conv.weight" else v for key, v in weights.items()}
    with pytest.raises(DataError, match=f"'{name}.conv.weight' has shape"):  # 7x1 in place of 1x7
        fill(Inception(), swapped)
    assert set(PARTS.values()) == {"kernel", "scale", "bias", "mean", "variance"}


def test_a_layer_without_padding_is_smaller():
    x = jnp.zeros((1, 9, 9, 3))
    assert Unit(3, Layer("a", 4, (3, 3), 2, False))(x).shape == (1, 4, 4, 4)
    assert Unit(3, Layer("a", 4, (1, 7)))(x).shape == (1, 9, 9, 4)
