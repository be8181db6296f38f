"""The vocabulary: nothing is lost, nothing collides, the same text trains the same model."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.config import ConfigError
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError

TEXTS = [f"a {size} {colour} circle\nat the top  left" for size in ("small", "large") for colour in ("red", "blue")]
TRAINED = Vocabulary.train(TEXTS * 20, 320, max_grid=8)
BYTES = Vocabulary.bytes(max_grid=8)
BOTH = pytest.mark.parametrize("vocabulary", [BYTES, TRAINED], ids=["bytes", "trained"])
AWKWARD = [
    "",
    " ",
    "  a  b ",
    "\n\na\r\n",
    "[IMG] <rows 3> <s> </s> <unk> <0x41>",
    "\u2581a\u2581",
    "\0x\0",
    "🎉é日本",
    "\u2585",
]


def foreign(**options) -> Vocabulary:
    """A SentencePiece model as other people train them."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, hard_vocab_limit=False, minloglevel=3, **options
    )
    return Vocabulary.from_bytes(model.getvalue())


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("a red\u2581\n\0[IMG]"))
def test_encode_loses_nothing(vocabulary, text):
    ids = vocabulary.encode(text)
    start, stop = vocabulary.text_range
    assert all(start <= i < stop for i in ids)
    assert vocabulary.decode(ids) == text


@BOTH
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


@BOTH
def test_lone_surrogates_become_replacement_characters(vocabulary):
    assert vocabulary.decode(vocabulary.encode("a\udc80b")) == "a\ufffdb"


@BOTH
def test_ids_are_disjoint_and_invertible(vocabulary):
    ids = list(range(5)) + [vocabulary.rows(n) for n in range(1, 9)] + [vocabulary.cols(n) for n in range(1, 9)]
    assert ids == list(range(vocabulary.text_range[0]))
    assert [vocabulary.row_count(vocabulary.rows(n)) for n in range(1, 9)] == list(range(1, 9))
    assert [vocabulary.col_count(vocabulary.cols(n)) for n in range(1, 9)] == list(range(1, 9))
    assert vocabulary.size == vocabulary.text_range[1]
    assert len({vocabulary.name(i) for i in range(vocabulary.text_range[0])}) == vocabulary.text_range[0]
    assert vocabulary.name(vocabulary.rows(3)) == "<rows 3>" and vocabulary.name(3) == "[IMG]"
    assert all(isinstance(vocabulary.name(i), str) for i in range(-1, vocabulary.size + 1))
    with pytest.raises(ValueError):
        vocabulary.row_count(vocabulary.cols(1))


@BOTH
def test_decode_ignores_specials_and_repairs_broken_bytes(vocabulary):
    ids = vocabulary.encode("é")
    assert vocabulary.decode([1, *ids, 3, vocabulary.rows(2), 2, 0, 10**9]) == "é"
    assert vocabulary.decode(ids[:1]) == "\ufffd"


def test_a_grid_beyond_max_grid_is_refused_in_one_line():
    for count in (0, 9):
        with pytest.raises(ConfigError, match="layout.max_grid=8") as error:
            BYTES.rows(count)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        Vocabulary.bytes(max_grid=0)


def test_training_is_deterministic_and_pays():
    assert Vocabulary.train(TEXTS * 20, 320, max_grid=8).to_bytes() == TRAINED.to_bytes()
    assert Vocabulary.train(iter(TEXTS[:2] * 20), 320).to_bytes() != TRAINED.to_bytes()
    assert len(TRAINED.encode("a small red circle")) == 4
    assert "[IMG]" not in [TRAINED.name(i) for i in TRAINED.encode("[IMG]")]


@pytest.mark.parametrize("texts", [["x" * 9000], ["\0"], [" "], ["日本語" * 50], ["".join(map(chr, range(0x4E00, 0x5200)))]])
def test_unusual_text_can_be_trained_on(texts):
    vocabulary = Vocabulary.train(texts, 320)
    assert vocabulary.decode(vocabulary.encode(texts[0])) == texts[0]


def test_no_text_or_no_room_is_one_line():
    with pytest.raises(DataError, match="bytes"):
        Vocabulary.train(["", "\n"], 320)
    with pytest.raises(ConfigError, match="300"):
        Vocabulary.train(TEXTS, 200)


@BOTH
def test_files_round_trip_and_fingerprints_differ(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocabulary.model")
    loaded = Vocabulary.load(tmp_path / "vocabulary.model", max_grid=8)
    assert loaded.fingerprint == vocabulary.fingerprint and loaded.encode("red") == vocabulary.encode("red")
    assert len({BYTES.fingerprint, TRAINED.fingerprint, Vocabulary.bytes().fingerprint}) == 3
    assert len(loaded.fingerprint) == 16 and vocabulary.warnings() == []


@pytest.mark.parametrize("damage", [b"", b"garbage", b'{"kind": "words"}', b"{", TRAINED.to_bytes()[:-7]])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    (tmp_path / "bad.model").write_bytes(damage)
    with pytest.raises(DataError, match="bad.model") as error:
        Vocabulary.load(tmp_path / "bad.model")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="absent.model"):
        Vocabulary.load(tmp_path / "absent.model")


@pytest.mark.parametrize("text", ["a red circle", " red  circle\n\n", *AWKWARD])
def test_ordinary_models_are_lossless_when_they_have_bytes(text):
    vocabulary = foreign(byte_fallback=True, vocab_size=310)
    assert vocabulary.warnings() == []
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_models_without_bytes_warn_and_mark_what_they_lose():
    vocabulary = foreign(vocab_size=60)
    assert len(vocabulary.warnings()) == 1
    assert vocabulary.decode(vocabulary.encode("a red circle")) == "a red circle"
    assert "\ufffd" in vocabulary.decode(vocabulary.encode("日本"))


def test_codes_of_an_image_tokenizer_come_after_the_text():
    plain = Vocabulary.bytes(max_grid=4)
    coded = plain.with_codes(10)
    assert coded.text_range == plain.text_range and coded.encode("abc") == plain.encode("abc")
    assert coded.codes_range == (plain.size, plain.size + 10) and coded.size == plain.size + 11
    assert coded.name(plain.size + 3) == "<code 3>" and coded.name(coded.size - 1) == "[MASK]"
    assert coded.decode([*coded.encode("ab"), plain.size, coded.size - 1]) == "ab"
    fingerprints = {v.fingerprint for v in (plain, coded, plain.with_codes(11))}
    assert len(fingerprints) == 3 and plain.with_codes(0).fingerprint == plain.fingerprint
