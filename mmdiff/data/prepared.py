"""Folders written by `mmdiff prepare`: ArrayRecord shards with an index.

    index.json                       {"format", "version", "shards": [{"file", "records", "bytes"}], "documents": [...]}
    documents-00000.array_record     one msgpack record per document, in the order of the index
    vocabulary.model

A document of the index holds its texts and image sizes, so that packing reads no pixels, and the CRC-32 of its record:
    {"segments": [{"text": str} | {"size": [height, width]}, ...], "split", "where", "crc32"}
A record holds {"segments": [{"text": str} | {"image": encoded bytes}, ...], "extra": {...}}.
Segments that are only read hold "learn": false.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff.data.sources import Outline, Size, resized_outline
from mmdiff.document import DataError, Document, Image, Segment, Text, decode_image

FORMAT, VERSION = "mmdiff documents", 1
REMEDY = "write the folder again with `mmdiff prepare SOURCE --out DIR --overwrite`"


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder, its shards checked for presence and size.

    Raises:
      DataError: the index is damaged or of another version, or a shard is missing or truncated.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        known = index["format"] == FORMAT
        shards = [(str(s["file"]), int(s["records"]), int(s["bytes"])) for s in index["shards"]]
        documents = len(index["documents"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged or no index of `mmdiff prepare`; {REMEDY}.") from error
    if not known or index.get("version") != VERSION:
        raise DataError(f"{path} has version {index.get('version')}, this mmdiff reads version {VERSION}; {REMEDY}.")
    for name, _, size in shards:
        shard = folder / name
        if not shard.is_file():
            raise DataError(f"{shard} is missing; {REMEDY}.")
        if shard.stat().st_size != size:
            raise DataError(f"{shard} is damaged: {shard.stat().st_size} bytes, not {size}; {REMEDY}.")
    if documents != sum(records for _, records, _ in shards):
        raise DataError(f"{path} is damaged: its shards do not hold its {documents} documents; {REMEDY}.")
    return index


class PreparedSource:
    """Some documents of a prepared folder."""

    def __init__(self, folder: Path, index: dict[str, Any], numbers: Sequence[int] | None = None, size: Size | None = None):
        """`index`: from `read_index`; `numbers`: the documents to show (None: all); `size` resizes their images."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder, self.size = folder, size
        self.documents = index["documents"]
        self.numbers = range(len(self.documents)) if numbers is None else numbers
        try:
            self._records = ArrayRecordDataSource([str(folder / shard["file"]) for shard in index["shards"]])
            count = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{folder}: the shards are damaged ({str(error).splitlines()[0][:120]}); {REMEDY}.") from error
        if count != len(self.documents):
            raise DataError(f"{folder}: the shards hold {count} documents, not {len(self.documents)}; {REMEDY}.")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Document:
        import msgpack

        number = self.numbers[index]
        try:
            record = self._records[number]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise self._damaged(index) from error
        if record is None or zlib.crc32(record) != self.documents[number]["crc32"]:
            raise self._damaged(index)
        value = msgpack.unpackb(record)
        segments: list[Segment] = []
        for segment in value["segments"]:
            learn = segment.get("learn", True)
            if "text" in segment:
                segments.append(Text(segment["text"], learn))
            else:
                segments.append(Image(decode_image(segment["image"], self.size, self.where(index)), learn))
        return Document(*segments, split=self.documents[number]["split"], extra=value["extra"])

    def outline(self, index: int) -> Outline:
        outline: Outline = []
        for segment in self.documents[self.numbers[index]]["segments"]:
            learn = segment.get("learn", True)
            outline.append(Text(segment["text"], learn) if "text" in segment else (*segment["size"], learn))
        return outline if self.size is None else resized_outline(outline, self.size)

    def where(self, index: int) -> str:
        return f"{self.folder.name}: {self.documents[self.numbers[index]]['where']}"

    def _damaged(self, index: int) -> DataError:
        return DataError(f"{self.where(index)}: record {self.numbers[index]} of {self.folder} is damaged; {REMEDY}.")
