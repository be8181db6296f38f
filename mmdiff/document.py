"""Documents: ordered lists of texts and images, and the documents.jsonl format.

A folder of data holds `documents.jsonl`, one document per line,

    {"segments": [{"text": "a red bus"}, {"image": "images/0001.png"}, ...]}

with image paths relative to the file. A segment may carry `"learn": false`: it is read, but no loss falls on it.
A document may carry `"split"`; any further keys are kept in `Document.extra`.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class DataError(ValueError):
    """Invalid data; the message says where, what and the remedy."""


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    learn: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An RGB image: `pixels` is uint8 [height, width, 3]."""

    pixels: np.ndarray
    learn: bool = True

    def __post_init__(self):
        pixels = np.asarray(self.pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise DataError(f"an Image holds uint8 pixels [height, width, 3], not {pixels.dtype} {list(pixels.shape)}.")
        object.__setattr__(self, "pixels", pixels)

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def __eq__(self, other):
        return isinstance(other, Image) and self.learn == other.learn and np.array_equal(self.pixels, other.pixels)

    def __repr__(self):
        return f"Image({self.height}x{self.width})"

    @classmethod
    def open(cls, path: str | Path, size: tuple[int, int] | None = None) -> "Image":
        """Read an image file; `size` = (height, width) centre-crops to that aspect and resizes.

        Raises:
          DataError: the file is missing or is no readable image.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"image {str(path)!r} not found ({error.strerror}).") from error
        return cls(decode_image(data, size, str(path)))

    def save(self, path: str | Path) -> None:
        import PIL.Image

        PIL.Image.fromarray(self.pixels).save(path)


class _Marker:
    """The prompt segment `mmdiff.IMG`: draw an image here, whatever the language head would say."""

    def __repr__(self):
        return "IMG"


IMG = _Marker()
Segment = Text | Image | _Marker


class Document:
    """An ordered list of segments. `Document("a red circle", IMG)` wraps strings as `Text`."""

    def __init__(self, *segments: "str | Segment", split: str = "train", extra: dict[str, Any] | None = None):
        wrapped = [Text(s) if isinstance(s, str) else s for s in segments]
        for segment in wrapped:
            if not isinstance(segment, (Text, Image, _Marker)):
                raise DataError(f"a Document holds strings, Text, Image and IMG, not {type(segment).__name__}.")
        self.segments: list[Segment] = wrapped
        self.split = split
        self.extra = extra or {}

    @property
    def texts(self) -> list[str]:
        return [s.text for s in self.segments if isinstance(s, Text)]

    @property
    def images(self) -> list[Image]:
        return [s for s in self.segments if isinstance(s, Image)]

    def __eq__(self, other):
        return isinstance(other, Document) and self.segments == other.segments

    def __repr__(self):
        return f"Document({', '.join(repr(s.text) if isinstance(s, Text) else repr(s) for s in self.segments)})"


def decode_image(data: bytes, size: tuple[int, int] | None = None, name: str = "image") -> np.ndarray:
    """Encoded image bytes to uint8 [height, width, 3]; transparency is laid on white.

    Raises:
      DataError: not a readable image.
    """
    import PIL.Image

    try:
        picture: PIL.Image.Image = PIL.Image.open(io.BytesIO(data))
        picture.load()
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise DataError(f"{name}: not a readable image ({str(error).splitlines()[0]}).") from error
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(ground, picture)
    picture = picture.convert("RGB")
    return np.asarray(picture) if size is None else resize(np.asarray(picture), size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre-crop uint8 [h, w, 3] to the aspect of `size` = (height, width), then resize (Lanczos)."""
    import PIL.Image

    height, width = pixels.shape[:2]
    if (height, width) == tuple(size):
        return pixels
    scale = min(height / size[0], width / size[1])
    crop_h, crop_w = min(height, round(size[0] * scale)), min(width, round(size[1] * scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    picture = PIL.Image.fromarray(pixels[top : top + crop_h, left : left + crop_w])
    return np.asarray(picture.resize((size[1], size[0]), PIL.Image.Resampling.LANCZOS))


@dataclasses.dataclass(frozen=True)
class Line:
    """One valid line of documents.jsonl, its images not yet read: segments are (kind, text or path, learn)."""

    segments: tuple[tuple[str, str, bool], ...]
    split: str
    extra: dict[str, Any]
    where: str

    def load(self, folder: Path, size: tuple[int, int] | None = None) -> Document:
        """Read the images. Raises DataError naming the line for a missing or corrupt file."""
        segments: list[Segment] = []
        for kind, value, learn in self.segments:
            if kind == "text":
                segments.append(Text(value, learn))
                continue
            path = folder / value
            if not path.is_file():
                raise DataError(f"{self.where}: image {value!r} not found; paths are relative to documents.jsonl.")
            try:
                segments.append(Image(decode_image(path.read_bytes(), size, f"image {value!r}"), learn))
            except DataError as error:
                raise DataError(f"{self.where}: {error}") from error
        return Document(*segments, split=self.split, extra=self.extra)


def parse_line(text: str, where: str) -> Line:
    """Validate one line of documents.jsonl.

    Raises:
      DataError: bad JSON, a wrong or empty segment; the message starts with `where` (file:line).
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(value, dict) or not isinstance(value.get("segments"), list) or not value["segments"]:
        raise DataError(f'{where}: a document is {{"segments": [...]}} with at least one segment.')
    segments = []
    for number, segment in enumerate(value["segments"], 1):
        here = f"{where}: segment {number}"
        if not isinstance(segment, dict) or ("text" in segment) == ("image" in segment):
            raise DataError(f'{here} must hold either "text" or "image".')
        kind = "text" if "text" in segment else "image"
        unknown = set(segment) - {kind, "learn"}
        if unknown:
            raise DataError(f'{here} has unknown key {sorted(unknown)[0]!r}; allowed beside "{kind}": "learn".')
        if not isinstance(segment[kind], str) or not segment[kind].strip():
            what = "an empty text" if kind == "text" else "an empty image path"
            raise DataError(f"{here} is {what}; fill it in or leave the segment out.")
        if not isinstance(segment.get("learn", True), bool):
            raise DataError(f'{here}: "learn" must be true or false.')
        segments.append((kind, segment[kind], segment.get("learn", True)))
    split = value.get("split", "train")
    if not isinstance(split, str):
        raise DataError(f'{where}: "split" must be a string.')
    extra = {k: v for k, v in value.items() if k not in ("segments", "split")}
    return Line(tuple(segments), split, extra, where)


def read_lines(path: str | Path) -> Iterator[Line]:
    """Parse documents.jsonl line by line; blank lines are skipped. Raises DataError at the first bad line."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} not found; a data folder holds documents.jsonl.")
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_line(line, f"{path.name}:{number}")
