"""The vocabulary: special tokens, image sizes, then text pieces.

    0 pad   1 bos   2 eos   3 [IMG]   4 [/IMG]   <rows 1> .. <rows G>   <cols 1> .. <cols G>   text pieces ...

and, in `with_codes`, the codes of an image tokenizer and [MASK]. G is `max_grid`, the largest number of patch rows or columns
a model can ask for. Text pieces are the 256 bytes, or those of a SentencePiece model. Encoding never yields a special token:
the text "[IMG]" stays text. With byte pieces (always, for vocabularies made here) every string survives
`decode(encode(text))`; a lone surrogate, which is no character and has no UTF-8 form, becomes U+FFFD.
"""

import builtins
import collections
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmdiff.config import ConfigError
from mmdiff.document import DataError

NAMES = ("<pad>", "<bos>", "<eos>", "[IMG]", "[/IMG]")
TRAINING_LINES = 200_000
"""Lines of text a vocabulary is trained on: the first ones, so that the result depends on nothing else."""
TRAINING_LINE_LENGTH = 1000
"""Longer lines are cut: SentencePiece would skip them."""
_BYTES_FILE = b'{"kind": "bytes"}\n'
_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


def text_start(max_grid: int) -> int:
    """The smallest id of a text piece."""
    return len(NAMES) + 2 * max_grid


class Vocabulary:
    """Text to token ids and back. Made by `Vocabulary.bytes`, `.train`, `.load` or `.from_bytes`."""

    pad, bos, eos, img, end_img = range(5)

    def __init__(self, model: builtins.bytes | None, max_grid: int = 64, codes: int = 0):
        """`model`: a serialized SentencePiece model, or None for bytes. `codes`: how many codes stand for images."""
        if max_grid < 1:
            raise ConfigError(f"layout.max_grid={max_grid} must be at least 1.")
        self.max_grid, self.codes = max_grid, codes
        self._model = model
        self._processor: Any = None if model is None else _processor(model)
        self._piece_bytes = [bytes([b]) for b in range(256)] if model is None else _piece_bytes(self._processor)
        self._piece_of_byte: dict[int, int] = {}
        if self._processor is None:
            self._piece_of_byte = {b: b for b in range(256)}
        elif self._processor.is_byte(self._processor.piece_to_id("<0x00>")):
            self._piece_of_byte = {b: self._processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)}

    # Ids.

    @property
    def size(self) -> int:
        """Number of ids, specials included."""
        return self.codes_range[1] + (1 if self.codes else 0)

    @property
    def rows_range(self) -> tuple[int, int]:
        """(start, stop) of the ids `<rows 1> .. <rows G>`."""
        return len(NAMES), len(NAMES) + self.max_grid

    @property
    def cols_range(self) -> tuple[int, int]:
        """(start, stop) of the ids `<cols 1> .. <cols G>`."""
        return len(NAMES) + self.max_grid, len(NAMES) + 2 * self.max_grid

    @property
    def text_range(self) -> tuple[int, int]:
        """(start, stop) of the text pieces' ids."""
        start = text_start(self.max_grid)
        return start, start + len(self._piece_bytes)

    @property
    def codes_range(self) -> tuple[int, int]:
        """(start, stop) of the ids of an image tokenizer's codes; [MASK] follows."""
        start = self.text_range[1]
        return start, start + self.codes

    def with_codes(self, codes: int) -> "Vocabulary":
        """The same vocabulary with ids for so many codes of an image tokenizer."""
        return Vocabulary(self._model, self.max_grid, codes)

    def rows(self, count: int) -> int:
        """Id of `<rows count>`. Raises ConfigError when the grid is larger than `max_grid`."""
        self._check_grid(count, "rows")
        return self.rows_range[0] + count - 1

    def cols(self, count: int) -> int:
        """Id of `<cols count>`. Raises ConfigError when the grid is larger than `max_grid`."""
        self._check_grid(count, "columns")
        return self.cols_range[0] + count - 1

    def row_count(self, token: int) -> int:
        """The inverse of `rows`. Raises ValueError for any other id."""
        return _offset(token, self.rows_range, "<rows>") + 1

    def col_count(self, token: int) -> int:
        """The inverse of `cols`. Raises ValueError for any other id."""
        return _offset(token, self.cols_range, "<cols>") + 1

    def name(self, token: int) -> str:
        """A readable form of one id."""
        if not 0 <= token < self.size:
            return f"<unknown {token}>"
        if token < len(NAMES):
            return NAMES[token]
        if token < self.rows_range[1]:
            return f"<rows {self.row_count(token)}>"
        if token < self.cols_range[1]:
            return f"<cols {self.col_count(token)}>"
        if token >= self.codes_range[0]:
            return "[MASK]" if token == self.codes_range[1] else f"<code {token - self.codes_range[0]}>"
        piece = self._piece_bytes[token - self.text_range[0]]
        try:
            return repr(piece.decode())
        except UnicodeDecodeError:
            return f"<byte {piece[0]:02x}>"

    def _check_grid(self, count: int, what: str) -> None:
        if not 1 <= count <= self.max_grid:
            raise ConfigError(
                f"an image of {count} patch {what} does not fit layout.max_grid={self.max_grid}; "
                "use smaller images, larger patches, or raise layout.max_grid."
            )

    # Text.

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces, all inside `text_range`."""
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        start = self.text_range[0]
        if self._processor is None:
            return [start + b for b in text.encode()]
        pieces = self._processor.encode(text)
        if self._join(pieces) != text.encode():
            # Rare in vocabularies made here (a literal U+2581). In others: normalisation, squeezed or added spaces.
            words = re.findall(r" ?[^\s]+|\s", text)
            pieces = list(itertools.chain.from_iterable(self._encode_word(word) for word in words))
        return [start + piece for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; specials are ignored, invalid UTF-8 becomes U+FFFD."""
        start, stop = self.text_range
        return self._join(int(i) - start for i in ids if start <= i < stop).decode(errors="replace")

    def warnings(self) -> list[str]:
        """What is known to be lossy, one line each."""
        lossy = (
            "the vocabulary has no byte pieces: characters it does not know are lost (read as U+FFFD). "
            "Train it with byte_fallback=True."
        )
        return [] if self._piece_of_byte else [lossy]

    def _join(self, pieces: Iterable[int]) -> builtins.bytes:
        return b"".join([self._piece_bytes[piece] for piece in pieces])

    def _encode_word(self, word: str) -> list[int]:
        """Pieces of a word, exact wherever the model allows; else its bytes, if the model has bytes."""
        pieces = self._processor.encode(word)
        joined = self._join(pieces)
        if joined == b" " + word.encode():  # the model adds a space in front: take it off again
            first = self._join(pieces[:1]).decode()[1:]
            bare = self._processor.piece_to_id(first)
            if not first or self._join([bare]) == first.encode():
                return pieces[1:] if not first else [bare, *pieces[1:]]
        if joined == word.encode() or not self._piece_of_byte:
            return pieces
        return [self._piece_of_byte[b] for b in word.encode()]

    # Files.

    def to_bytes(self) -> builtins.bytes:
        """What `save` writes: a plain SentencePiece model, or one line of JSON for bytes."""
        return _BYTES_FILE if self._model is None else self._model

    @classmethod
    def from_bytes(cls, data: builtins.bytes, max_grid: int = 64, where: str = "vocabulary") -> "Vocabulary":
        """The inverse of `to_bytes`. Raises DataError, naming `where`, for anything else."""
        if data.lstrip()[:1] == b"{":
            try:
                known = json.loads(data) == {"kind": "bytes"}
            except ValueError:
                known = False
            if known:
                return cls(None, max_grid)
        try:
            return cls(data, max_grid)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, max_grid: int = 64) -> "Vocabulary":
        """Read a saved vocabulary or any SentencePiece model; see `warnings`. Raises DataError if it cannot be read."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"vocabulary {str(path)!r} cannot be read ({error.strerror}).") from error
        return cls.from_bytes(data, max_grid, f"vocabulary {str(path)!r}")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: equal fingerprints, equal vocabularies."""
        kind = "bytes" if self._model is None else "sentencepiece"
        codes = f"{self.codes} codes " if self.codes else ""
        return hashlib.sha256(f"{kind} {self.max_grid} {codes}".encode() + self.to_bytes()).hexdigest()[:16]

    def __repr__(self):
        return f"Vocabulary({'bytes' if self._model is None else 'sentencepiece'}, size={self.size})"

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 512, max_grid: int = 64) -> "Vocabulary":
        """Train byte-pair pieces, at most `size` of them, on the first `TRAINING_LINES` lines of the texts.

        The same texts give the same bytes. A small text may yield fewer pieces than asked for.

        Raises:
          ConfigError: `size` is too small for the 256 bytes.
          DataError: no text to train on.
        """
        import sentencepiece

        if size < 300:
            raise ConfigError(f"data.vocabulary_size={size} must be at least 300: 256 of them are bytes.")
        lines = list(itertools.islice(_training_lines(texts), TRAINING_LINES))
        if not lines:
            raise DataError("the data has no text to train a vocabulary on; set data.vocabulary='bytes'.")
        lines = _without_rare_characters(lines, keep=(size - 257) // 2)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * TRAINING_LINE_LENGTH,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=3,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0].strip()
            raise DataError(
                f"no vocabulary of data.vocabulary_size={size} can be trained on this text ({reason}); "
                "raise data.vocabulary_size or set data.vocabulary='bytes'."
            ) from error
        return cls(model.getvalue(), max_grid)

    @classmethod
    def bytes(cls, max_grid: int = 64) -> "Vocabulary":
        """One piece per byte: needs no training and knows every language."""
        return cls(None, max_grid)


def _processor(model: bytes):
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError):
        processor = None
    if processor is None or not processor.get_piece_size():
        raise DataError("not a SentencePiece model, or a damaged one; train it again or set data.vocabulary='bytes'.")
    return processor


def _piece_bytes(processor) -> list[bytes]:
    """What each piece stands for; nothing for control pieces, U+FFFD for the unknown one."""
    table = []
    for piece in range(processor.get_piece_size()):
        name = processor.id_to_piece(piece)
        if processor.is_byte(piece):
            table.append(bytes([int(name[1:-1], 16)]))
        elif processor.is_unknown(piece):
            table.append("\ufffd".encode())
        elif processor.is_control(piece):
            table.append(b"")
        else:
            table.append(name.replace(_SPACE, " ").encode())
    return table


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines of bounded length, without what SentencePiece cannot train on (NUL, lone surrogates)."""
    for text in texts:
        for line in re.sub("[\ud800-\udfff\0]", "\ufffd", text).split("\n"):
            for start in range(0, len(line), TRAINING_LINE_LENGTH):
                yield line[start : start + TRAINING_LINE_LENGTH]


def _without_rare_characters(lines: list[str], keep: int) -> list[str]:
    """Cut out all but the `keep` most frequent characters: SentencePiece makes a piece of every one it sees.

    The rare ones are still encoded, as bytes.
    """
    counts = collections.Counter(itertools.chain.from_iterable(lines))
    if len(counts) <= keep:
        return lines
    rare = "".join(character for character, _ in counts.most_common()[keep:])
    return [part for line in lines for part in re.split(f"[{re.escape(rare)}]+", line) if part]


def _offset(token: int, limits: tuple[int, int], what: str) -> int:
    if not limits[0] <= token < limits[1]:
        raise ValueError(f"token {token} is no {what} token (ids {limits[0]} to {limits[1] - 1}).")
    return int(token) - limits[0]
