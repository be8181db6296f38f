"""TensorFlow Datasets as documents of one caption and one image, read without TensorFlow from array_record files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmdiff import config
from mmdiff.data.sources import Outline, Size, hold_out
from mmdiff.document import DataError, Document, Image, Text, resize


class TfdsSource:
    """A split of a TFDS data set as documents of one caption and one image."""

    def __init__(self, images, captions, caption: Callable[[Any], str], keys: tuple[str, str], size: Size, where: str):
        """`captions` is `images` without decoding pixels; `keys` names the features of image and caption ("": none)."""
        self.images, self.captions, self.caption = images, captions, caption
        self.image_key, self.caption_key = keys
        self.size, self.name = size, where

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Document:
        example = self.images[index]
        pixels = np.asarray(example[self.image_key])
        if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise DataError(f"{self.where(index)}: {self.image_key!r} is no RGB or grey uint8 image but {pixels.shape}.")
        picture = Image(resize(np.repeat(pixels, 3 // pixels.shape[2], axis=2), self.size))
        return Document(*self._texts(example), picture)

    def outline(self, index: int) -> Outline:
        return [*(self._texts(self.captions[index]) if self.caption_key else ()), (*self.size, True)]

    def where(self, index: int) -> str:
        return f"{self.name}: example {index}"

    def _texts(self, example: dict[str, Any]) -> list[Text]:
        text = self.caption(example[self.caption_key]) if self.caption_key else ""
        return [Text(text)] if text.strip() else []


class _Subset:
    """Some elements of a random-access sequence."""

    def __init__(self, whole, numbers: Sequence[int]):
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int):
        return self.whole[self.numbers[index]]


def open_tfds(data: config.Data, split: Literal["train", "validation"]) -> TfdsSource:
    if data.image_size is None:
        raise config.ConfigError("data.source='tfds' needs data.image_size=(height, width): its images vary in size.")
    import tensorflow_datasets as tfds

    here = f"data.path={data.path!r}"
    try:
        is_folder = Path(data.path).is_dir()
        builder = tfds.builder_from_directory(data.path) if is_folder else tfds.builder(data.path)
        features = builder.info.features
        known = sorted(builder.info.splits)
    except Exception as error:  # anything from a misspelt name to a missing TensorFlow
        raise DataError(f"{here}: TFDS cannot open it ({_first_line(error)}).") from error
    if not known:
        raise DataError(
            f"{here} is not prepared; run `tfds build {data.path} --file_format=array_record` where TensorFlow is "
            "installed, and set TFDS_DATA_DIR to its folder."
        )
    kinds = {name: type(feature).__name__ for name, feature in sorted(features.items())}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    if not images:
        raise DataError(f"{here} has no image feature; it has {', '.join(kinds)}.")
    image_key = "image" if "image" in images else images[0]
    if data.caption_key and data.caption_key not in kinds:
        others = ", ".join(name for name in kinds if name not in images) or "none"
        raise config.ConfigError(
            f"data.caption_key={data.caption_key!r} is no feature of {data.path}; it has {others}. "
            "Set it to one of these, or to '' for images alone."
        )
    names = features[data.caption_key] if kinds.get(data.caption_key) == "ClassLabel" else None

    def caption(value: Any) -> str:
        if names is not None:
            return names.int2str(int(value)).replace("_", " ")
        return value.decode() if isinstance(value, bytes) else str(value)

    def read(name: str, decoders=None):
        try:
            return builder.as_data_source(split=name, decoders=decoders)
        except Exception as error:
            remedy = f"it has splits {', '.join(known)}; data must be prepared with --file_format=array_record"
            raise DataError(f"{here}: cannot read split {name!r} ({_first_line(error)}); {remedy}.") from error

    own = data.validation_split.split("[")[0] in known
    name = data.validation_split if split == "validation" and own else data.split
    decoded, bare = read(name), read(name, {image_key: tfds.decode.SkipDecoding()})
    if not own:
        numbers = hold_out(range(len(decoded)), data)[split == "validation"]
        decoded, bare = _Subset(decoded, numbers), _Subset(bare, numbers)
    keys = (image_key, data.caption_key)
    return TfdsSource(decoded, bare, caption, keys, data.image_size, f"{data.path} {name}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
