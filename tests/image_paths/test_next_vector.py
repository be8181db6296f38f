"""Codes whose numbers are regressed: what travels, what is learnt, and that drawing takes the nearest code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.data.batches import Batches, Choice
from mmdiff.document import IMG, Document
from mmdiff.evaluation.evaluate import chosen
from mmdiff.evaluation.task import Task
from mmdiff.image_paths import next_vector
from mmdiff.layout import ImagePiece, ImagePlan
from mmdiff.training.loss import combine
from tests.tokenizers.test_semantic import Listed
from tests.tokenizers.tiny import SIZE

from .test_draw import GREEDY, GRID, laid
from .tiny import COUNT, PATCH, model, picture, pieces_of, tokenizer

NOTHING = Choice(False, False, False, False)
VALUES = 3 * PATCH**2


@pytest.fixture(scope="module")
def made():
    return model("next_vector")


def predictions(made, rows):
    """Of whole rows, float32 [b, t, p]."""
    bound, clean = made.network.bind(made.params), jnp.zeros(rows.tokens.shape)
    hidden = bound.hidden(rows.tokens, rows.is_patch, rows.patches, clean, rows.cell, rows.position, rows.mask)
    return bound.predict(hidden, rows.cell)


@pytest.mark.parametrize("name", ["fsq", "vq"])
def test_the_nearest_of_the_levels_is_the_code_itself(name):
    one = tokenizer(name)
    levels = one.levels(VALUES)
    network = one.network.bind(one.params)
    codes = np.asarray(one.network.quantizer.decode(network.params, network.codebook, jnp.arange(one.codes)))
    assert levels.shape == (one.codes, VALUES) and (levels[:, codes.shape[1] :] == 128).all()
    given = levels[:, : codes.shape[1]] / 127.5 - 1
    np.testing.assert_allclose(given * np.abs(codes).max(), codes, atol=np.abs(codes).max() / 250)
    apart = np.square(given[:, None] - given).sum(-1)
    np.testing.assert_array_equal(apart.argmin(-1), np.arange(one.codes))
    with pytest.raises(ConfigError, match=r"a code has \d numbers, and a position of a row carries 1"):
        one.levels(1)


def test_the_loss_is_the_distance_to_the_numbers_of_the_next_code(made):
    listed = Listed([Document("ab", picture(1)), Document(picture(2), "c")])
    batches = Batches(listed, made.vocabulary, made.cfg, learn=False, tokenizer=made.tokenizer)
    apart, weights = [], []
    for index in range(2):
        rows = jax.tree.map(lambda a: a[None], batches.laid(index, NOTHING))
        (ids,) = made.tokenizer.encode([listed[index].images[0].pixels])
        numbers = made.tokenizer.levels(VALUES)[ids] / 127.5 - 1
        np.testing.assert_allclose(rows.patches[rows.is_patch] / 127.5 - 1, numbers)
        first = int(np.flatnonzero(rows.is_patch[0])[0])
        said = np.asarray(predictions(made, rows))[0, first - 1 : first - 1 + COUNT]
        apart.append(np.square(said - numbers).sum(-1).mean())
        _, found = combine(next_vector.losses(made.network, made.cfg, made.params, rows), made.cfg.diffusion)
        np.testing.assert_allclose(found["image_loss"], apart[-1], rtol=1e-4)
        weights.append(rows.image_weight[rows.is_patch].sum())
    assert weights == pytest.approx([1, 1]) and apart[0] != apart[1]


def nearest_by_whole_rows(made, pieces, shift=0):
    """One whole row for each code; `shift` reads what is said at another position: the wrong way."""
    levels = made.tokenizer.levels(VALUES) / 127.5 - 1
    drawn = np.zeros(COUNT, np.int32)
    run = jax.jit(lambda rows: predictions(made, rows))
    for column in range(COUNT):
        rows = laid(made, [*pieces[:-1], ImagePiece(drawn, *GRID)], ImagePlan(True, 0))
        first = int(np.flatnonzero(rows.is_patch[0] & (rows.image[0] == rows.image[0].max()))[0])
        said = np.asarray(run(rows))[0, first + column - 1 + shift]
        drawn[column] = np.square(levels - said).sum(-1).argmin()
    return drawn


def test_drawing_takes_the_nearest_code_and_feeds_it_back(made):
    (out,) = made.generate([Document("abc", picture(3), "de", IMG)], **GREEDY)
    pieces = [*pieces_of(made, Document("abc", picture(3), "de")), ImagePiece(None, *GRID)]
    expected = nearest_by_whole_rows(made, pieces)
    np.testing.assert_array_equal(out.images[-1].pixels, made.tokenizer.decode(expected[None])[0])
    assert len(set(expected.tolist())) > 2 and out.images[-1].pixels.shape[:2] == SIZE
    assert (nearest_by_whole_rows(made, pieces, shift=1) != expected).any()
    with pytest.raises(ConfigError, match="guidance=2.0 has no meaning"):
        made.generate([Document("a", IMG)], guidance=2.0)


def test_codes_that_are_regressed_have_no_bits():
    listed = Listed([Document("ab", picture(1))])
    of = lambda images: chosen(Task(model(images), given=listed), None)
    assert "code_bits" in of("next_code") and "code_bits" in of("masked_code")
    assert "code_bits" not in of("next_vector")
    with pytest.raises(ConfigError, match="code_bits cannot be measured"):
        chosen(Task(model("next_vector"), given=listed), ["code_bits"])
