"""Front ends of features: pixels travel whole, texts read the images before them, cached = uncached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.adapters.front_end import find
from mmdiff.adapters.slices import Slices
from mmdiff.data.batches import Batches
from mmdiff.document import DataError, Document
from mmdiff.image_paths.base import image_path
from mmdiff.layout import ImagePiece, empty_row
from mmdiff.models.network import Network
from mmdiff.sampling.cache import chunks, empty_cache, extend
from tests.adapters.tiny import FRONTS, SIDE, configuration, laid, logits_of, model, picture, rows_of

found_in = jax.jit(find, static_argnames="grid")


@pytest.mark.parametrize("front", ["linear", "resampler"])
def test_pixels_come_back_from_rows(front):
    """Also where K = 3 does not divide the number of patches."""
    made = model(front)
    one, two, three = (picture(seed) for seed in range(3))
    rows = rows_of(made, [Document("a", one, "bc", two), Document(three)], [Document("text alone")])
    found = found_in(rows.patches, rows.cell, made.network.front.grid)
    pixels = made.tokenizer.decode(np.asarray(found.slices[0]))
    for index, image in enumerate((one, two, three)):
        np.testing.assert_array_equal(pixels[index], image.pixels)
        assert rows.image[0, found.at[0, index]].tolist() == [index + 1] * found.at.shape[-1]
    assert (found.at[0, 3:] == 64).all() and (found.at[1] == 64).all()
    slices = made.tokenizer.encode([one.pixels, two.pixels])
    np.testing.assert_array_equal(made.tokenizer.decode(slices), np.stack([one.pixels, two.pixels]))
    with pytest.raises(DataError, match=r"takes \(8, 8, 3\)"):
        made.tokenizer.encode([one.pixels[:4]])


def test_as_many_images_are_found_as_a_row_can_hold():
    made = model("linear")
    documents = [Document(picture(seed)) for seed in range(6)]  # with [BOS] and [EOS], 60 of 64 positions
    rows = rows_of(made, documents)
    found = found_in(rows.patches, rows.cell, (2, 2))
    assert (found.at[0, :, 0] < 64).sum() == 6 and found.at.shape[1] == (64 + 3) // (4 + 4)
    chunk = jax.tree.map(lambda a: a[:, 4:13], rows)  # an image whose sizes were read before
    assert (found_in(chunk.patches, chunk.cell, (2, 2)).at[0, :, 0] < 9).sum() == 1


@pytest.mark.parametrize("front", ["linear", "gated"])
def test_texts_read_the_images_before_them_alone(front):
    """Whichever image changes, texts behind it in its document change, and no others do."""
    made = model(front)
    first, second = Document("a", picture(0), "b", picture(1), "c"), Document("d", picture(2), "e")
    rows = rows_of(made, [first, second])
    where = {letter: np.flatnonzero(rows.tokens[0] == made.vocabulary.encode(letter)[0])[0] for letter in "abcde"}
    one, two = logits_of(made, [first, second], [Document("a", picture(7), "b", picture(1), "c"), second])
    three, _ = logits_of(made, [Document("a", picture(0), "b", picture(7), "c"), second], [first])
    for letter, at in where.items():
        for changed, behind in ((two, "bc"), (three, "c")):
            apart = np.abs(changed[at] - one[at]).max()
            assert apart > 1e-5 if letter in behind else apart == 0, (letter, behind, apart)


@pytest.mark.parametrize(("front", "block"), [("linear", "attention"), ("gated", "gau")])
def test_cached_is_uncached(front, block):
    made = model(front, block=block)
    network, params = made.network, made.params
    one, two = Document("ab", picture(0), "cd", picture(1), "e"), Document("abc", picture(2), "x")
    streams = [laid(made, document, end=False) for document in (one, two)]
    whole = logits_of(made, [one], [two], end=False)
    cache = empty_cache(network, 2, 64, jnp.float32)
    # the first image of one stream is cut off from its sizes; of the other all is read at once
    image = int(np.flatnonzero(streams[0].is_patch)[0])
    parts = [jax.tree.map(lambda a: a[:image], streams[0]), streams[1]]
    starts = [0, 0]
    for stops in (parts, streams):
        for chunk in chunks(network, stops, starts):
            cache, said = extend(network, params, cache, chunk)
        starts = [len(stop.tokens) for stop in stops]
        if stops is parts:
            np.testing.assert_allclose(said[1], whole[1, len(streams[1].tokens) - 1], atol=3e-5)
    last = len(streams[0].tokens) - 1
    np.testing.assert_allclose(said[0], whole[0, last], atol=3e-5)


def test_texts_are_generated_one_by_one_as_in_whole_rows():
    """Greedy texts behind an image: each token is the likeliest of the whole row's logits."""
    made = model("gated")
    prompts = [Document(picture(0)), Document("a", picture(1))]
    told = made.generate(prompts, max_tokens=5, temperature=0.0)
    said = logits_of(made, *([document] for document in told), end=False)
    rows = rows_of(made, *([document] for document in told), end=False)
    start, stop = made.vocabulary.text_range
    for number, (prompt, document) in enumerate(zip(prompts, told, strict=True)):
        first = np.flatnonzero(rows.tokens[number] == made.vocabulary.end_img)[0]
        last = int(np.flatnonzero(rows.tokens[number])[-1])
        assert last > first
        for at in range(first, last):
            allowed = np.full(said.shape[-1], -np.inf)
            allowed[start:stop] = allowed[made.vocabulary.eos] = 0
            assert int((said[number, at] + allowed).argmax()) == rows.tokens[number, at + 1]
        assert prompt.images[0].pixels.tobytes() == document.images[0].pixels.tobytes()


@pytest.mark.parametrize("front", [*FRONTS, "next_embedding"])
def test_every_front_end_has_a_loss_in_low_precision(front):
    """Traced, not run: types and shapes agree, also where layers are recomputed."""
    emu = front == "next_embedding"
    cfg = configuration("causal_former" if emu else front, images="next_embedding" if emu else "read")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute="bfloat16", remat="full"))
    network, path = Network.of(cfg, 300), image_path(cfg.layout)
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(network.axes(), is_leaf=lambda leaf: type(leaf) is tuple)
    rows = jax.tree.map(lambda a: a[None], empty_row(64, cfg.patch_values))
    noise = path.noise(network, cfg, rows, jax.random.key(0))
    found = jax.eval_shape(lambda params: path.losses(network, cfg, params, rows, *noise), params)
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def test_mirrored_images_are_mirrored_whole():
    slices, image = Slices(configuration("resampler")), picture(3).pixels
    batches = object.__new__(Batches)
    batches.tokenizer = slices
    mirrored = batches._flipped(ImagePiece(slices.encode([image])[0], 1, 3))
    np.testing.assert_array_equal(slices.decode(mirrored.patches[None])[0], image[:, ::-1])
    assert image.shape == (SIDE, SIDE, 3)
