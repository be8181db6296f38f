"""Generation: independent of company, repeatable, faithful to known pixels, clear about its limits."""

import jax
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.layout import patchify
from mmdiff.sampling import generate
from mmdiff.sampling.generate import Model
from mmdiff.sampling.image import to_pixels
from mmdiff.training.loss import normalise

FEW = {"max_tokens": 4, "max_images": 1, "steps": 2}


@pytest.fixture(scope="module")
def model(tiny_gau):
    return Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary)


@pytest.fixture(scope="module")
def prompts(new_picture):
    return [Document("12", IMG), Document(new_picture(2, 3), "4"), Document(IMG, "5", IMG), Document("67")]


def bytes_of(document: Document):
    return [s.pixels.tobytes() if isinstance(s, Image) else s.text for s in document.segments]


@pytest.fixture(scope="module")
def together(model, prompts):
    return model.generate(prompts, **FEW, seed=7)


def test_the_same_seed_gives_the_same_bytes(model, prompts, together):
    assert list(map(bytes_of, model.generate(prompts, **FEW, seed=7))) == list(map(bytes_of, together))
    assert list(map(bytes_of, model.generate(prompts, **FEW, seed=8))) != list(map(bytes_of, together))


def test_groups_do_not_show(model, prompts, together, monkeypatch):
    monkeypatch.setattr(generate, "GROUP", 3)
    for alone, one in zip(model.generate(prompts, **FEW, seed=7), together, strict=True):
        equal_up_to_a_level(alone, one)


def equal_up_to_a_level(one: Document, other: Document):
    assert one.texts == other.texts and len(one.images) == len(other.images)
    for a, b in zip(one.images, other.images, strict=True):
        assert a.pixels.shape == b.pixels.shape
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1


def test_documents_of_one_call_get_different_noise(model):
    two = model.generate([Document("1", IMG)] * 2, image_size=(4, 4), max_tokens=0, steps=2, seed=0)
    assert bytes_of(two[0]) != bytes_of(two[1])


def test_images_of_one_document_get_different_noise(model):
    (document,) = model.generate([Document(IMG, IMG)], image_size=(4, 4), max_tokens=0, steps=1, seed=0)
    assert len(document.images) == 2 and not np.array_equal(document.images[0].pixels, document.images[1].pixels)


def test_noise_of_a_patch_does_not_depend_on_the_padding():
    key = jax.random.key(3)
    long = jax.random.normal(key, (16, 12))
    np.testing.assert_array_equal(jax.random.normal(key, (6, 12)), long[:6])


def test_a_clean_image_survives_rounding():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(normalise(levels)), levels)
    np.testing.assert_array_equal(to_pixels(np.float32([-3.0, 3.0])), [0, 255])


# Inpainting.


@pytest.mark.parametrize("solver", ["unipc2", "heun", "ddpm"])
def test_inpainting_keeps_every_known_pixel_and_repaints_the_rest(model, new_picture, solver):
    image = new_picture(3, 2, seed=4)
    mask = np.zeros((6, 4), bool)
    mask[1:4, 1:3] = True  # cuts through patches
    repainted = [model.inpaint(image, mask, "12", steps=3, solver=solver, seed=s) for s in (0, 1)]
    for result in repainted:
        np.testing.assert_array_equal(result.pixels[~mask], image.pixels[~mask])
        assert np.any(result.pixels[mask] != image.pixels[mask])
    assert np.any(repainted[0].pixels != repainted[1].pixels)


def test_what_is_known_is_seen_where_it_is_repainted(model, new_picture):
    mask = np.zeros((6, 4), bool)
    mask[:2, :2] = True
    one, other = new_picture(3, 2, seed=4), new_picture(3, 2, seed=5)
    results = [model.inpaint(image, mask, steps=3, seed=0).pixels[mask] for image in (one, other)]
    assert np.any(results[0] != results[1])


def test_a_mask_of_another_size_is_refused(model, new_picture):
    with pytest.raises(DataError, match=r"mask \(3, 3\) does not match the image \(6, 4\)"):
        model.inpaint(new_picture(3, 2), np.zeros((3, 3), bool))


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, r"unknown sampling option 'step'; did you mean 'steps'\?"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"guidance": -1.0}, r"guidance=-1\.0 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be in \(0, 1\]"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must not be negative"),
        ({"solver": "euler"}, r"unknown solver 'euler'"),
        ({"image_size": (5, 4)}, r"5x4 is not divisible by model\.patch=2"),
        ({"seed": [1]}, r"seed has 1 entries for 2 documents"),
    ],
)
def test_options_that_cannot_work_are_one_line(model, options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        model.generate([Document("1", IMG)] * 2, **{"max_tokens": 0, "image_size": (4, 4)} | options)
    assert "\n" not in str(refused.value)


def test_prompts_that_cannot_be_read_are_refused(model, new_picture):
    with pytest.raises(DataError, match=r"generate takes a list of documents"):
        model.generate(Document("1"))
    with pytest.raises(ConfigError, match=r"3x4 is not divisible by model\.patch=2"):
        model.generate([Document(Image(np.zeros((3, 4, 3), np.uint8)))])
    with pytest.raises(DataError, match=r"prompt 2 needs \d+ positions but the model was trained with layout\.row_length=64"):
        model.generate([Document("1"), Document("1" * 80)])


def test_prompt_images_come_back_unchanged(model, prompts, together):
    given = prompts[1].images[0]
    np.testing.assert_array_equal(together[1].images[0].pixels, given.pixels)
    assert patchify(given.pixels, 2).shape == (6, 12)
