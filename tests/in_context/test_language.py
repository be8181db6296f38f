"""Many prompts at once are continued as each by itself; what may not stand does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.config import ConfigError
from mmdiff.document import DataError
from mmdiff.in_context.language import WORDS, Language, load_language
from mmdiff.pretrained.load import save_module

from .tiny import SIZES, TEXTS, language, logits, pieces

PROMPTS = [[1, 40, 50, 60], [1, 7], list(range(3, 40)), [1, 99, 98]]


def step_by_step(which, prompt, count):
    """Without a cache and without company."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 48), np.int32)  # what follows is not read
        padded[0, : len(ids)] = ids
        ids.append(int(logits(which, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_prompts_of_all_lengths_are_continued_as_each_alone():
    found = language().greedy(PROMPTS, 3)
    assert found.tolist() == [step_by_step(language(), prompt, 3) for prompt in PROMPTS]
    assert len({tuple(row) for row in found.tolist()}) > 1


def test_padding_on_the_left_is_not_read():
    model = nnx.merge(language().graph, language().params)
    ids = jnp.array([[0, 0, 0, *PROMPTS[0]]])
    alone = logits(language(), [PROMPTS[0]])[0, -1]
    behind = model.logits(model(model.embed(ids), None, jnp.array([3]))[0])[0, -1]
    np.testing.assert_allclose(behind, alone, rtol=1e-4, atol=1e-4)
    read = model.logits(model(model.embed(ids))[0])[0, -1]
    assert np.abs(read - alone).max() > 0.1  # without `first` it is


def test_only_what_may_stand_is_chosen():
    allowed = np.zeros((2, language().size), bool)
    allowed[0, [5, 9]], allowed[1, 11] = True, True
    found = language().greedy(PROMPTS[:2], 2, [allowed, ~allowed])
    expected = logits(language(), [PROMPTS[0]])[0, -1]
    assert found[0].tolist() == [5 if expected[5] > expected[9] else 9, 11]
    assert found[1, 0] not in (5, 9) and found[1, 1] != 11


def test_rows_behind_the_last_piece_are_never_chosen():
    """A vocabulary filled up from 300 pieces to 600 rows; those behind the pieces say the same, and louder."""
    model = nnx.merge(language().graph, language().params)
    model.embedding = nnx.Param(jnp.concatenate([model.embedding[...], 2 * model.embedding[...]]))
    which = Language(model, language().processor)
    assert logits(which, [PROMPTS[0]])[0, -1].argmax() >= 300
    assert which.greedy(PROMPTS, 3).tolist() == language().greedy(PROMPTS, 3).tolist()
    may = np.broadcast_to(np.arange(600) >= 299, (2, 600))
    assert which.greedy(PROMPTS[:1], 2, [may]).tolist() == [[299, 299]]


def test_a_cache_takes_no_more_than_it_has_positions_for():
    model = nnx.merge(language().graph, language().params)
    model(model.embed(jnp.ones((1, 3), int)), model.cache(1, 3))
    with pytest.raises(ValueError, match="4 tokens behind a cache of 3 positions"):
        model(model.embed(jnp.ones((1, 4), int)), model.cache(1, 3))


def test_bad_input():
    assert language().greedy([], 2).shape == (0, 2)
    with pytest.raises(ConfigError, match="an empty prompt cannot be continued"):
        language().greedy([[1], []], 2)


def test_it_is_loaded_from_a_folder(tmp_path):
    cfg = SIZES | {"num_hidden_layers": 2, "vocab_size": 300, "tie_word_embeddings": True}
    save_module(nnx.merge(language().graph, language().params), tmp_path, cfg)
    with pytest.raises(DataError, match=r"tokenizer\.model: not there"):
        load_language(tmp_path)
    (tmp_path / WORDS).write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        load_language(tmp_path)
    (tmp_path / WORDS).write_bytes(pieces(300))
    again = load_language(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, language().params))
    assert again.decode(again.encode(TEXTS[0])) == TEXTS[0]
    (tmp_path / WORDS).write_bytes(pieces(310))
    with pytest.raises(ConfigError, match="310 pieces, and the language model knows 300"):
        load_language(tmp_path)
