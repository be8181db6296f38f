"""A folder of documents for people and for training: index.html, sheet.png, documents.jsonl, images/.

`documents.jsonl` is the format the trainer reads. A document's `extra` says how it came about: `prompt` (how many of its
segments were given), `seed`, `ended` (the model ended it itself).
"""

import contextlib
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdiff.document import DataError, Document, Image, Text
from mmdiff.evaluation.sheets import document_sheet

MADE_HERE = {"index.html", "sheet.png", "documents.jsonl", "images"}
SHOWN = 256  # pixels that small images are enlarged to on the page, at least

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid #ddd; padding: 1.2rem 0 }
p { margin: .4rem 0; white-space: pre-wrap }
img { display: inline-block; margin: .4rem .4rem .4rem 0; image-rendering: pixelated; vertical-align: top }
.given { color: #888 }
footer { color: #888; font-size: .8rem }
"""


def free_folder(parent: Path, name: str) -> Path:
    """A folder inside `parent` that does not exist yet: `<name>`, `<name>-2`, ..."""
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")[:60].strip("-") or "samples"
    number = 1
    while (parent / (slug if number == 1 else f"{slug}-{number}")).exists():
        number += 1
    return parent / (slug if number == 1 else f"{slug}-{number}")


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to write over anything but, with `overwrite`, a folder of this module.

    Raises:
      DataError: names the folder and the remedy.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give a folder.")
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    if not overwrite:
        raise DataError(f"{folder} is not empty; give another folder, or --overwrite to replace earlier samples.")
    foreign = sorted(found - MADE_HERE)
    if foreign or "index.html" not in found:
        what = f"holds {foreign[0]!r}" if foreign else "holds no index.html"
        raise DataError(f"{folder} {what}, so it is no folder of samples; it is not overwritten.")


def write_documents(documents: Sequence[Document], folder: Path, title: str) -> list[list[str]]:
    """Write documents into `folder`, all of it or nothing; replaces what stands there (see check_free).

    Returns:
      for each document its segments, as texts and as image paths relative to the folder.
    """
    with _whole_folder(folder) as part:
        (part / "images").mkdir()
        told: list[list[str]] = []
        lines, articles, number = [], [], 0
        for document in documents:
            segments, names = [], []
            for segment in document.segments:
                if isinstance(segment, Image):
                    number += 1
                    names.append(f"images/{number:04d}.png")
                    segment.save(part / names[-1])
                    segments.append({"image": names[-1]})
                elif isinstance(segment, Text):
                    names.append(segment.text)
                    if segment.text.strip():  # the format has no empty texts
                        segments.append({"text": segment.text})
            told.append(names)
            articles.append(_article(document, names))
            if segments:
                lines.append(json.dumps({"segments": segments} | document.extra, ensure_ascii=False) + "\n")
        (part / "documents.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
        (part / "index.html").write_text(_page(title, articles), encoding="utf-8", errors="replace")
        document_sheet(documents, part / "sheet.png")
    return told


def _article(document: Document, names: Sequence[str]) -> str:
    given, parts = document.extra.get("prompt", 0), []
    for index, (segment, name) in enumerate(zip(document.segments, names, strict=True)):
        kind = "given" if index < given else "made"
        if isinstance(segment, Image):
            factor = max(1, SHOWN // max(segment.width, segment.height))
            size = f'width="{segment.width * factor}" height="{segment.height * factor}"'
            parts.append(f'<img class="{kind}" src="{name}" {size} alt="">')
        else:
            parts.append(f'<p class="{kind}">{html.escape(name)}</p>')
    notes = [f"{name} {value}" for name, value in document.extra.items() if name == "seed"]
    unfinished = len(parts) > given and isinstance(document.segments[-1], Text) and not document.extra.get("ended", True)
    if unfinished:
        notes.append("not ended by the model")
    return "\n".join(["<article>", *parts, f"<footer>{', '.join(notes)}</footer>", "</article>"])


def _page(title: str, articles: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", f"<html><head>{head}</head><body>", f"<h1>{html.escape(title)}</h1>", *articles]) + (
        "\n</body></html>\n"
    )


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; it takes its place when nothing went wrong."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part, old = scratch / "new", scratch / "old"
        part.mkdir()
        yield part
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
