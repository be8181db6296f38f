"""Hugging Face ImageFolder: images beside metadata.jsonl or metadata.csv.

A line of metadata holds `file_name`, relative to the metadata, a caption column, perhaps `split`, and anything else.
The metadata stands at the top of the folder, or in split folders, whose name is then the split unless a line says
otherwise.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdiff.data.sources import numbered_lines
from mmdiff.document import DataError, Line

SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


def read_image_folder(folder: Path, caption_key: str) -> tuple[list[Line], list[str]]:
    """Every good line as a document of a caption and an image, and one message for each bad line.

    Raises:
      DataError: there is no metadata, or it names nothing.
    """
    lines: list[Line] = []
    problems: list[str] = []
    found = False
    for inside in ("", *SPLIT_FOLDERS):
        for name in ("metadata.jsonl", "metadata.csv"):
            path = folder / inside / name
            if path.is_file():
                found = True
                lines.extend(_metadata(path, inside, caption_key, problems))
                break
    if not found:
        raise DataError(f"{folder} holds neither documents.jsonl nor metadata.jsonl (or metadata.csv) beside images.")
    if not lines and not problems:
        raise DataError(f"{folder}: the metadata names no image.")
    return lines, problems


def _metadata(path: Path, inside: str, caption_key: str, problems: list[str]) -> Iterator[Line]:
    """The lines of one metadata file, which stands in the folder `inside` of the source."""
    name = f"{inside}/{path.name}".lstrip("/")
    rows = _csv_rows(path, name, problems) if path.suffix == ".csv" else _json_rows(path, name, problems)
    for where, row in rows:
        file, caption = row.get("file_name"), row.get(caption_key)
        split = row.get("split") or SPLIT_FOLDERS.get(inside, "train")
        if not isinstance(file, str) or not file.strip():
            problems.append(f'{where}: no "file_name"; each line names an image file.')
        elif caption_key not in row:
            keys = ", ".join(sorted(k for k in row if k not in ("file_name", "split"))) or "none"
            problems.append(f'{where}: no caption "{caption_key}"; columns: {keys}. Set --caption-key.')
        elif not isinstance(caption, str) or not caption.strip():
            problems.append(f'{where}: the caption "{caption_key}" is empty; fill it in or remove the line.')
        elif not isinstance(split, str):
            problems.append(f'{where}: "split" must be a string.')
        else:
            extra = {k: v for k, v in row.items() if k not in ("file_name", "split", caption_key)}
            yield Line((("text", caption, True), ("image", f"{inside}/{file}".lstrip("/"), True)), split, extra, where)


def _json_rows(path: Path, name: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, text in numbered_lines(path, problems, name):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not valid JSON ({error.msg} at column {error.colno}).")
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            problems.append(f'{where}: a line is {{"file_name": ..., caption}}.')


def _csv_rows(path: Path, name: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            for row in reader:
                yield f"{name}:{reader.line_num}", {k: v for k, v in row.items() if k is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{name}: not a UTF-8 CSV file ({error}).")
