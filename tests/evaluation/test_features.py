"""Feature extractors: what they see, that they are the same every time, and that resizing is what it says."""

import functools

import numpy as np
import PIL.Image
import pytest
import scipy.fft

from mmdiff.data.shapes import Shapes
from mmdiff.document import DataError
from mmdiff.evaluation import encoder, features
from mmdiff.evaluation.distances import frechet, moments
from mmdiff.evaluation.features import Features, patch_dct_features, random_features, side_for
from mmdiff.evaluation.resize import bilinear_matrix, resize

QUICK = {"steps": 80, "together": 12}


@functools.cache
def pictures(count, split="train", size=32):
    made = Shapes(0, count, size, 2, (("draw", 1.0),), split)
    return [made[i].images[0].pixels for i in range(count)]


@pytest.fixture(scope="module")
def trained():
    return encoder.train(pictures(200), 32, **QUICK)


@pytest.fixture(scope="module", params=["random", "patch_dct", "encoder"])
def extractor(request, trained):
    match request.param:
        case "random":
            return random_features(32)
        case "patch_dct":
            return patch_dct_features()
        case _:
            return encoder.features(trained[0], 32)


def test_bilinear_by_hand():
    np.testing.assert_allclose(bilinear_matrix(2, 4, False), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_array_equal(bilinear_matrix(5, 5, True), np.eye(5))
    np.testing.assert_allclose(bilinear_matrix(4, 1, False), [[0, 0.5, 0.5, 0]])  # aliases: half of the row is not seen
    assert bilinear_matrix(4, 1, True).min() > 0


@pytest.mark.parametrize("size", [(20, 31), (64, 40)])
def test_antialiased_resizing_is_pillows(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    want = np.asarray(PIL.Image.fromarray(image).resize((32, 32), PIL.Image.Resampling.BILINEAR), np.float32)
    found = np.asarray(resize(image[None].astype(np.float32), 32, 32, antialias=True))[0]
    assert np.abs(found - want).max() <= 1  # Pillow rounds to whole levels twice
    if size == (64, 40):
        assert np.abs(np.asarray(resize(image[None].astype(np.float32), 32, 32, antialias=False))[0] - want).max() > 10


def test_features_do_not_depend_on_the_batch(extractor):
    images = pictures(5) + pictures(2, size=48) + pictures(70)[5:]
    found = extractor(images)
    assert found.shape == (72, extractor.width) and found.dtype == np.float32
    alone = np.concatenate([extractor([image]) for image in images[3:7]])
    np.testing.assert_allclose(found[3:7], alone, rtol=1e-4, atol=1e-5)
    assert extractor([]).shape == (0, extractor.width)


def test_every_extractor_tells_what_is_wrong_with_pictures_from_other_real_ones(extractor):
    rng = np.random.default_rng(0)
    real, other = pictures(200), pictures(400)[200:]
    spoilt = {
        "noise": [np.clip(x + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8) for x in other],
        "blurred": [((x.astype(int) + np.roll(x, 1, 0) + np.roll(x, 1, 1)) // 3).astype(np.uint8) for x in other],
        "colours": [x[..., [0, 2, 1]] for x in other],
    }
    near = frechet(moments(extractor(real)), moments(extractor(other)))
    if extractor.name == "encoder":  # colours are what it has learnt after these few steps
        spoilt = {"colours": spoilt["colours"]}
    for name, images in spoilt.items():
        assert frechet(moments(extractor(real)), moments(extractor(images))) > 1.3 * near, name


def test_hashes_name_architecture_and_weights(trained):
    found = {random_features(32).digest, random_features(64).digest, patch_dct_features().digest}
    found.add(encoder.features(trained[0], 32).digest)
    assert len(found) == 4
    assert random_features(32).digest == random_features(32).digest == "a75db95ff4539196"  # the same everywhere
    changed = trained[0] | {"mean": trained[0]["mean"] + 1e-4}
    assert encoder.features(changed, 32).digest not in found


def test_random_kernels_have_the_variance_they_should():
    kernels = features.random_kernels()
    assert np.var(kernels[1]) * 9 * features.RANDOM_WIDTH == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(kernels[0][..., ::2].sum((0, 1, 2)), 0, atol=1e-5)
    assert np.abs(kernels[0][..., 1::2].sum((0, 1, 2))).max() > 0.1


def test_spectra_are_those_of_scipy_block_by_block():
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    colours = (image / 127.5 - 1) @ features.OPPONENT.T
    blocks = [colours[i : i + 8, j : j + 8] for i in range(0, 9, 4) for j in range(0, 13, 4)]
    found = np.stack([scipy.fft.dctn(b, axes=(0, 1), norm="ortho").transpose(2, 0, 1) for b in blocks])
    means = found[:, :, 0, 0].mean(0)
    found[:, :, 0, 0] -= means
    want = np.concatenate([means / 8, np.log1p((found**2).mean(0) / features.LEVEL**2).reshape(-1) / 4])
    np.testing.assert_allclose(patch_dct_features()([image])[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.OPPONENT @ features.OPPONENT.T, np.eye(3), atol=1e-12)


def test_pictures_smaller_than_a_block_are_refused():
    with pytest.raises(DataError, match="at least 8x8 pixels, not 4x16"):
        patch_dct_features()([np.zeros((4, 16, 3), np.uint8)])


def test_the_side_is_the_smallest_that_holds_the_pictures():
    sized = lambda *size: [np.zeros((*size, 3), np.uint8)]
    assert [side_for(sized(*size)) for size in ((8, 8), (32, 32), (40, 20), (109, 89), (300, 300))] == [32, 32, 64, 128, 128]


def test_the_encoder_learns_and_is_the_same_again(trained):
    params, losses = trained
    assert np.mean(losses[-10:]) < losses[0] - 1
    again, _ = encoder.train(pictures(200), 32, **QUICK)
    assert encoder.features(again, 32).digest == encoder.features(params, 32).digest
    h = encoder.features(params, 32)(pictures(200))
    np.testing.assert_allclose([h.mean(), h.std()], [0, 1], atol=0.01)


def test_a_trained_encoder_is_kept_and_a_damaged_or_foreign_file_is_not_taken(tmp_path, capsys):
    path = tmp_path / "evaluation" / "encoder.npz"
    first = encoder.trained(pictures(4), 32, path, steps=2)
    assert "training the encoder" in capsys.readouterr().err
    second = encoder.trained(iter(()), 32, path)  # reads no picture
    assert (first.digest, capsys.readouterr().err) == (second.digest, "")
    np.testing.assert_allclose(first(pictures(3)), second(pictures(3)), rtol=1e-5)
    for spoil in (b"", path.read_bytes()[:3000], b"PK\x03\x04 nonsense"):
        path.write_bytes(spoil)
        with pytest.raises(DataError, match="holds no encoder"):
            encoder.load(path)
    np.savez(path, side=32, conv1=np.zeros(3))
    with pytest.raises(DataError, match="another network"):
        encoder.load(path)
    with pytest.raises(DataError, match="of which there are 1"):
        encoder.train(pictures(1), 32)


def test_corruptions_are_what_their_names_say():
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)), jnp.float32)
    made = np.asarray(encoder.corrupt(jax.random.key(0), x, jnp.arange(5)))
    np.testing.assert_array_equal(made[0], x[0])
    assert np.abs(np.diff(made[1], axis=0)).mean() < 0.6 * np.abs(np.diff(x[1], axis=0)).mean()
    assert np.std(made[2] - x[2]) == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(made[3][:16, :16], x[3][:16, :16])
    np.testing.assert_array_equal(made[3][:16, 16:], x[2][:16, 16:])
    assert 0.3 < np.mean(made[4] != x[4]) < 0.5


def test_sets_of_no_extractor_are_empty():
    assert list(features.batches([], 4)) == []
    shapes = [b.shape for b in features.batches([np.zeros((2, 2, 3))] * 5 + [np.zeros((4, 2, 3))], 4)]
    assert shapes == [(4, 2, 2, 3), (1, 2, 2, 3), (1, 4, 2, 3)]
    assert isinstance(patch_dct_features(), Features)
