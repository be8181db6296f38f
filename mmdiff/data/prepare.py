"""`mmdiff prepare`: validate a folder of data, count it, and write it as ArrayRecord shards (mmdiff/data/prepared.py).

The source is one of

    documents.jsonl      one document per line (mmdiff/document.py)
    metadata.jsonl/.csv  Hugging Face ImageFolder (mmdiff/data/image_folder.py): each caption, then its image

Every bad line is reported, not only the first. The output appears complete or not at all: it is written beside its
place and renamed at the end.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmdiff import config
from mmdiff.data.image_folder import read_image_folder
from mmdiff.data.prepared import FORMAT, VERSION
from mmdiff.data.sources import Size, read_folder
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Image, Line, decode_image
from mmdiff.layout import ImagePiece, TextPiece, laid_length, plan_images

SHARD_BYTES = 2**28
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
PATCHES = (4, 8)
PROGRESS = 1000  # documents from which a progress bar is worth its lines


class InvalidData(DataError):
    """Everything that is wrong with a source: `problems` holds one line for each bad line of the data."""

    def __init__(self, problems: list[str], shown: int = 20):
        self.problems = problems
        more = [f"... and {len(problems) - shown} more."] if len(problems) > shown else []
        super().__init__("\n".join([*problems[:shown], *more]))


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written."""

    splits: dict[str, int]
    """Documents per split."""
    image_sizes: dict[Size, int]
    """Images per (height, width)."""
    texts: int
    text_bytes: int
    tokens: int
    vocabulary: int
    """Text pieces and special tokens together."""
    positions: dict[int, np.ndarray]
    """Positions each document needs, by patch side; absent where some image is not divisible by it."""
    stored_bytes: int

    def table(self) -> str:
        """The report for a person."""
        count = sum(self.image_sizes.values())
        rows = [("documents", ", ".join(f"{name} {number:,}" for name, number in self.splits.items()))]
        rows.append(("images", f"{count:,}"))
        if count:
            common = collections.Counter(self.image_sizes).most_common(5)
            shown = ", ".join(f"{h}x{w} {number:,}" for (h, w), number in common)
            rest = len(self.image_sizes) - len(common)
            heights, widths = zip(*self.image_sizes, strict=True)
            rows.append(("image sizes", shown + (f", {rest} more sizes" if rest > 0 else "") + " (height x width)"))
            rows.append(("", f"heights {min(heights)} to {max(heights)}, widths {min(widths)} to {max(widths)}"))
        rows.append(("texts", f"{self.texts:,} of {self.text_bytes:,} bytes"))
        ratio = f", {self.text_bytes / self.tokens:.2f} bytes per token" if self.tokens else ""
        rows.append(("tokens", f"{self.tokens:,}{ratio}; vocabulary of {self.vocabulary:,}"))
        for patch in PATCHES:
            lengths = self.positions.get(patch)
            need = "some image is not divisible by it"
            if lengths is not None:
                need = f"median {int(np.median(lengths))}, most {lengths.max()} positions per document"
            rows.append((f"model.patch={patch}", need))
        if self.positions:
            rows.append(("", "layout.row_length must be at least the most; a few times the median wastes little"))
        rows.append(("written", f"{self.stored_bytes / 1e6:,.1f} MB"))
        return "\n".join(f"{name:<14} {value}".rstrip() for name, value in rows)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    image_size: Size | None = None,
    caption_key: str = "text",
    vocabulary: Literal["train", "bytes"] = "train",
    vocabulary_size: int = 512,
    overwrite: bool = False,
) -> Report:
    """Validate `source` and write it to the folder `out`.

    Args:
      image_size: (height, width) to centre-crop and resize to; None keeps every image file as it is.
      caption_key: ImageFolder: the column with the caption.
      vocabulary: `train` makes one of at most `vocabulary_size` pieces from the texts of the split "train".
      overwrite: replace `out` if it was written by `prepare`.
    Raises:
      InvalidData: some lines are bad; nothing is written.
      DataError, ConfigError: no such source, or an output that must not be replaced.
    """
    source, out = Path(source), Path(out)
    _check_out(source, out, overwrite)
    is_folder = (source / "documents.jsonl").is_file()
    lines, problems = read_folder(source) if is_folder else read_image_folder(source, caption_key)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        shards, documents = _write_shards(partial, source, lines, image_size, problems)
        if problems:
            raise InvalidData(problems)
        texts = [[s["text"] for s in d["segments"] if "text" in s] for d in documents]
        learnt = [t for t, d in zip(texts, documents, strict=True) if d["split"] == "train"] or texts
        if vocabulary == "bytes":
            words = Vocabulary.bytes()
        else:
            words = Vocabulary.train((text for own in learnt for text in own), vocabulary_size)
        words.save(partial / "vocabulary.model")
        index = {"format": FORMAT, "version": VERSION, "shards": shards, "documents": documents}
        (partial / "index.json").write_text(json.dumps(index))
        report = _report(documents, words, sum(file.stat().st_size for file in partial.iterdir()))
        _replace(partial, out)
        return report
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give one with documents.jsonl, or with images and metadata.jsonl.")
    if (source / "index.json").is_file():
        raise DataError(f"{source} was already written by `mmdiff prepare`; train on it with --data.path {source}.")
    if source.resolve().is_relative_to(out.resolve()):
        raise config.ConfigError(f"--out {out} would replace the source {source}; choose another folder.")
    if out.exists() and not out.is_dir():
        raise config.ConfigError(f"--out {out} is a file; choose another folder.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise config.ConfigError(f"--out {out} is not empty; choose another folder or add --overwrite.")
        if not (out / "index.json").is_file():
            raise config.ConfigError(f"--out {out} was not written by `mmdiff prepare`: it is not overwritten.")


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`."""
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(
    folder: Path, source: Path, lines: list[Line], image_size: Size | None, problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the records; returns the index's shards and documents. After the first problem, only validates."""
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter
    from tqdm import tqdm

    shards: list[dict[str, Any]] = []
    documents = []
    writer, size = None, 0
    try:
        for line in tqdm(lines, "prepare", unit="doc", disable=None if len(lines) > PROGRESS else True):
            try:
                stored, outline = _convert(line, source, image_size)
            except DataError as error:
                problems.append(str(error))
            if problems:
                continue
            record = msgpack.packb({"segments": stored, "extra": _clean(line.extra)})
            if writer is None or size + len(record) > SHARD_BYTES:
                if writer is not None:
                    writer.close()
                shards.append({"file": f"documents-{len(shards):05d}.array_record", "records": 0})
                writer, size = ArrayRecordWriter(str(folder / shards[-1]["file"]), "group_size:1,uncompressed"), 0
            writer.write(record)
            size += len(record)
            shards[-1]["records"] += 1
            documents.append({"segments": outline, "split": line.split, "where": line.where, "crc32": zlib.crc32(record)})
    finally:
        if writer is not None:
            writer.close()
    for shard in shards:
        shard["bytes"] = (folder / shard["file"]).stat().st_size
    return shards, documents


def _convert(line: Line, source: Path, image_size: Size | None) -> tuple[list[dict], list[dict]]:
    """The segments of a line as stored in its record, and as listed in the index."""
    stored, outline = [], []
    for kind, value, learn in line.segments:
        flags = {} if learn else {"learn": False}
        if kind == "text":
            stored.append({"text": _clean(value), **flags})
            outline.append(stored[-1])
            continue
        try:
            data = (source / value).read_bytes()
        except OSError as error:
            base = line.where.rpartition(":")[0]
            raise DataError(f'{line.where}: image "{value}" not found; paths are relative to {base}.') from error
        try:
            pixels = decode_image(data, image_size, f'image "{value}"')
        except DataError as error:
            raise DataError(f"{line.where}: {error}") from error
        stored.append({"image": data if image_size is None else _png(pixels), **flags})
        outline.append({"size": list(pixels.shape[:2]), **flags})
    return stored, outline


def _png(pixels: np.ndarray) -> bytes:
    import io

    import PIL.Image

    encoded = io.BytesIO()
    PIL.Image.fromarray(Image(pixels).pixels).save(encoded, "png", compress_level=3)
    return encoded.getvalue()


def _clean(value: Any) -> Any:
    """JSON values that msgpack can hold: lone surrogates, which are no characters, become U+FFFD."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


def _report(documents: list[dict[str, Any]], vocabulary: Vocabulary, stored_bytes: int) -> Report:
    texts = [s["text"] for d in documents for s in d["segments"] if "text" in s]
    tokens = {text: np.asarray(vocabulary.encode(text), np.int32) for text in set(texts)}
    sizes = collections.Counter(tuple(s["size"]) for d in documents for s in d["segments"] if "size" in s)
    layout = config.Layout(trailing_context=1.0)
    positions = {}
    for patch in PATCHES:
        if any(h % patch or w % patch for h, w in sizes):
            continue
        lengths = []
        for document in documents:
            pieces = [
                TextPiece(tokens[s["text"]], s.get("learn", True))
                if "text" in s
                else ImagePiece(None, s["size"][0] // patch, s["size"][1] // patch, s.get("learn", True))
                for s in document["segments"]
            ]
            lengths.append(laid_length(pieces, plan_images(pieces, layout, trailing_context=True), layout))
        positions[patch] = np.asarray(lengths)
    return Report(
        splits=dict(collections.Counter(d["split"] for d in documents)),
        image_sizes=dict(sizes),
        texts=len(texts),
        text_bytes=sum(len(text.encode()) for text in texts),
        tokens=sum(len(tokens[text]) for text in texts),
        vocabulary=vocabulary.size,
        positions=positions,
        stored_bytes=stored_bytes,
    )
