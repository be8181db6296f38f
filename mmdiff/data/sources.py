"""Sources: where documents come from, behind one small protocol.

    documents   a folder with documents.jsonl, or one written by `mmdiff prepare`
    shapes      the built-in generators: a document is a function of (seed, index)
    words
    probes
    tfds        a TensorFlow Datasets name or folder in array_record form, read without TensorFlow

Everything that can be wrong with the data is found when a source is opened, before the first training step.
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mmdiff import config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image, Line, Text, parse_line

HOLD_OUT = 20
"""Without a validation split, every 20th training document is held out."""
GENERATED_VALIDATION = 1000
"""Generators: most documents in the validation split."""
VOCABULARY_DOCUMENTS = 20_000
"""Documents a vocabulary is trained on: the first ones."""

Size = tuple[int, int]
Outline = list["Text | tuple[int, int, bool]"]
"""A document without pixels: Text, or (height, width, learn) for an image."""


class Source(Protocol):
    """A finite, random-access set of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def outline(self, index: int) -> Outline:
        """The texts and image sizes of document `index`, without reading pixels."""
        ...

    def where(self, index: int) -> str:
        """Where a person finds document `index`: file and line."""
        ...


def open_source(cfg: config.Config, split: Literal["train", "validation"]) -> Source:
    """The documents of one split of the configured data.

    When the data has no validation split, every 20th training document is held out and this is said on stderr; a
    validation source of fewer than 20 training documents is empty.

    Raises:
      ConfigError: a field of `data` cannot work.
      DataError: the data is missing or damaged; the message names file and line.
    """
    data = cfg.data
    if data.source in ("shapes", "words", "probes"):
        return _open_generator(cfg, split)
    if not data.path:
        what = "a dataset name" if data.source == "tfds" else "a folder with documents.jsonl"
        raise config.ConfigError(f"data.path is empty; data.source={data.source!r} needs {what} (--data.path).")
    if data.source == "tfds":
        from mmdiff.data.tfds_source import open_tfds

        return open_tfds(data, split)
    folder = Path(data.path)
    if (folder / "index.json").is_file():
        from mmdiff.data.prepared import PreparedSource, read_index

        index = read_index(folder)
        chosen = choose_split([d["split"] for d in index["documents"]], data, split)
        return PreparedSource(folder, index, chosen, data.image_size)
    lines, problems = read_folder(folder)
    if problems:
        raise DataError(problems[0] + _more(len(problems)))
    chosen = choose_split([line.split for line in lines], data, split)
    return FolderSource(folder, [lines[i] for i in chosen], data.image_size)


def open_vocabulary(cfg: config.Config, source: Source) -> Vocabulary:
    """The vocabulary that `data.vocabulary` names; `source`: the training source, whose texts it may learn from."""
    data, max_grid = cfg.data, cfg.layout.max_grid
    prepared = Path(data.path) / "vocabulary.model"
    if data.vocabulary == "bytes":
        return Vocabulary.bytes(max_grid)
    if data.vocabulary != "auto":
        return Vocabulary.load(data.vocabulary, max_grid)
    if data.source == "documents" and prepared.is_file():
        return Vocabulary.load(prepared, max_grid)
    count = min(len(source), VOCABULARY_DOCUMENTS)
    return Vocabulary.train(outline_texts(map(source.outline, range(count))), data.vocabulary_size, max_grid)


def outline_texts(outlines: Iterable[Outline]) -> Iterator[str]:
    """All texts of some outlines, in order."""
    return (segment.text for outline in outlines for segment in outline if isinstance(segment, Text))


def choose_split(splits: Sequence[str], data: config.Data, split: Literal["train", "validation"]) -> list[int]:
    """Numbers of the documents of a split; `splits` holds the split name of each document."""
    train = [i for i, name in enumerate(splits) if name == data.split]
    validation = [i for i, name in enumerate(splits) if name == data.validation_split]
    if not train and split == "train":
        counts = ", ".join(f"{name!r} ({splits.count(name)})" for name in sorted(set(splits))) or "no documents at all"
        raise DataError(f"{data.path}: no document has data.split={data.split!r}; the data has {counts}.")
    if not validation:
        train, validation = hold_out(train, data)
    return train if split == "train" else validation


def hold_out(train: Sequence[int], data: config.Data) -> tuple[list[int], list[int]]:
    """(kept, held out) of the training documents, for data without a validation split."""
    if len(train) < HOLD_OUT:
        _say(f"data: no documents of split {data.validation_split!r} and too few to hold any out: no validation.")
        return list(train), []
    _say(
        f"data: no documents of split {data.validation_split!r}; holding out every {HOLD_OUT}th of split "
        f"{data.split!r} ({len(train) // HOLD_OUT} of {len(train)})."
    )
    held = list(train[HOLD_OUT - 1 :: HOLD_OUT])
    return [i for n, i in enumerate(train, 1) if n % HOLD_OUT], held


@functools.cache  # once per process
def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _more(count: int) -> str:
    return f" ({count - 1} more; `mmdiff prepare` lists them)" if count > 1 else ""


# Folders.


def read_folder(folder: Path) -> tuple[list[Line], list[str]]:
    """Every line of documents.jsonl: the good ones, and one message for each bad one."""
    path = folder / "documents.jsonl"
    if not path.is_file():
        raise DataError(f"{path} not found; data.path must hold documents.jsonl, or what `mmdiff prepare` wrote.")
    lines: list[Line] = []
    problems: list[str] = []
    for where, text in numbered_lines(path, problems):
        try:
            lines.append(parse_line(text, where))
        except DataError as error:
            problems.append(str(error))
    if not lines and not problems:
        raise DataError(f"{path} is empty.")
    return lines, problems


def numbered_lines(path: Path, problems: list[str], name: str = "") -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank; what is not UTF-8 goes to `problems`."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{name or path.name}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8.")
                continue
            if text.strip():
                yield where, text.rstrip("\r\n")


def header_size(path: Path, value: str, where: str) -> Size:
    """(height, width) from an image file's header, its checksums verified where the format has any."""
    import PIL.Image

    if not path.is_file():
        raise DataError(f'{where}: image "{value}" not found; paths are relative to {where.split(":")[0]}.')
    try:
        with PIL.Image.open(path) as picture:
            width, height = picture.size
            picture.verify()
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise DataError(f'{where}: image "{value}" is not a readable image; replace it or remove the line.') from error
    return height, width


class FolderSource:
    """Some lines of a documents.jsonl; every image file was opened and verified when this was made."""

    def __init__(self, folder: Path, lines: Sequence[Line], size: Size | None = None):
        self.folder, self.lines, self.size = folder, lines, size
        problems: list[str] = []
        self._outlines = [self._outline(line, problems) for line in lines]
        if problems:
            raise DataError(problems[0] + _more(len(problems)))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Document:
        return self.lines[index].load(self.folder, self.size)

    def outline(self, index: int) -> Outline:
        return self._outlines[index]

    def where(self, index: int) -> str:
        return self.lines[index].where

    def _outline(self, line: Line, problems: list[str]) -> Outline:
        outline: Outline = []
        for kind, value, learn in line.segments:
            if kind == "text":
                outline.append(Text(value, learn))
                continue
            try:
                outline.append((*(header_size(self.folder / value, value, line.where)), learn))
            except DataError as error:
                problems.append(str(error))
                return []
        return outline if self.size is None else resized_outline(outline, self.size)


def resized_outline(outline: Outline, size: Size) -> Outline:
    return [segment if isinstance(segment, Text) else (*size, segment[2]) for segment in outline]


# Generators.


class GeneratorSource:
    """A generator's documents."""

    def __init__(self, generator: Any, name: str):
        self.generator, self.name = generator, name
        self._outlines: list[Outline | None] = [None] * len(generator)

    def __len__(self) -> int:
        return len(self.generator)

    def __getitem__(self, index: int) -> Document:
        return self.generator[index]

    def outline(self, index: int) -> Outline:
        known = self._outlines[index]
        if known is None:
            segments = self.generator[index].segments
            known = [(s.height, s.width, s.learn) if isinstance(s, Image) else s for s in segments]
            self._outlines[index] = known
        return known

    def where(self, index: int) -> str:
        return f"data.source={self.name!r}: document {index}"


def _open_generator(cfg: config.Config, split: Literal["train", "validation"]) -> GeneratorSource:
    """Training documents depend on training.seed; validation documents are the same for every seed."""
    from mmdiff.data.probes import Probes
    from mmdiff.data.shapes import Shapes
    from mmdiff.data.words import Words

    data = cfg.data
    train = split == "train"
    arguments: dict[str, Any] = {
        "seed": cfg.training.seed if train else 0,
        "size": data.size if train else min(data.size, GENERATED_VALIDATION),
        "image_size": data.generator_image_size,
        "mix": data.generator,
        "split": data.split if train else data.validation_split,
    }
    made: Any
    if data.source == "shapes":
        made = Shapes(max_objects=data.max_objects, **arguments)
    else:
        made = (Words if data.source == "words" else Probes)(**arguments)
    return GeneratorSource(made, data.source)
