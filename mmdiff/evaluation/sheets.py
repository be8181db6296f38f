"""Sheets: pictures of what a model draws and reads, with the texts beside or under them."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from mmdiff.document import IMG, Document, Image, Text
from mmdiff.evaluation.prompts import drawings, pictures

CELL = 112  # pixels of an image's shorter side, about; small images are enlarged by a whole factor
LONGEST_SIDE = 448
GAP = 14
LINE = 16
LINES = 7  # of a text; what is longer is cut
TEXT_WIDTH = 150  # of a text that stands between images
GROUND, INK, FAINT = (255, 255, 255), (35, 35, 35), (130, 130, 130)


def sample_sheet(model, batches, path: str | Path | None, count: int = 8) -> np.ndarray:
    """Draw `count` prompts and caption `count` held-out images; save (unless `path` is None) and return the sheet,
    uint8 [h, w, 3].

    Prompts are `sampling.prompts`, or what stands before images in the data. Keys are fixed, so sheets of one run compare.
    """
    cfg = model.cfg
    if not cfg.layout.markers:
        return _save(_images_alone(model, batches.source, 2 * count), path)
    wanted = [d for d in drawings(batches.source, cfg, 4 * count) if not d.prompt.images][:count]
    prompts = [d.prompt for d in wanted]
    if cfg.layout.images == "read":
        prompts = []
    elif cfg.sampling.prompts:
        prompts = [Document(p, IMG) for p in cfg.sampling.prompts[:count]]
    bands = []
    if prompts:
        size = (wanted[0].image.height, wanted[0].image.width) if wanted else None
        drawn = model.generate(prompts, seed=0, max_tokens=0, image_size=size)
        bands.append(band("drawn from the text below", [(d.images[-1].pixels, "".join(d.texts)) for d in drawn]))
    shown = [image for image, _ in pictures(batches.source, cfg, count)]
    if shown:
        told = model.generate([Document(image) for image in shown], seed=0, temperature=0.0, max_images=0)
        cells = [(i.pixels, "".join(t.texts) or "(nothing)") for i, t in zip(shown, told, strict=True)]
        bands.append(band("described by the model", cells))
    return _save(stacked(bands), path)


def reconstruction_sheet(tokenizer, batches, path: str | Path | None, count: int = 16) -> np.ndarray:
    """Held-out images above what a tokenizer (mmdiff/tokenizers/model.py) gives back of them; as `sample_sheet`."""
    real = [d.image.pixels for d in drawings(batches.source, tokenizer.cfg, count)]
    made = tokenizer.reconstruct(real)
    half, bands = -(-len(real) // 2), []
    for start in range(0, len(real), half or 1):
        for title, images in (("held out", real), ("given back", made)):
            bands.append(band(title, [(pixels, "") for pixels in images[start : start + half]]))
    return _save(stacked(bands), path)


def _images_alone(model, source, count: int) -> PIL.Image.Image:
    """What a model without text draws, in rows of half of them, and held-out images of the same size."""
    wanted = drawings(source, model.cfg, count)
    real = [d.image.pixels for d in wanted]
    size = real[0].shape[:2] if real else None
    drawn = model.generate([Document(IMG)] * count, seed=0, image_size=size)
    half = count // 2
    rows = {"drawn": [d.images[-1].pixels for d in drawn], "held out": real}
    bands = [
        band(title if start == 0 else "", [(pixels, "") for pixels in images[start : start + half]])
        for title, images in rows.items()
        for start in range(0, len(images), half)
    ]
    return stacked(bands)


def document_sheet(documents: Sequence[Document], path: str | Path) -> np.ndarray:
    """Documents one below the other, their texts and images from left to right; save and return it, uint8 [h, w, 3].

    Documents of one image each stand in rows.
    """
    if all(len(d.segments) == 1 and isinstance(d.segments[0], Image) for d in documents):
        width = max(4, round(len(documents) ** 0.5))
        documents = [
            Document(*(d.segments[0] for d in documents[start : start + width])) for start in range(0, len(documents), width)
        ]
    return _save(stacked([strip(document) for document in documents]), path)


def band(title: str, cells: Sequence[tuple[np.ndarray, str]]) -> PIL.Image.Image:
    """Images side by side, the text of each below it, a title above."""
    images = [scaled(pixels) for pixels, _ in cells]
    texts = [text_block(text, max(CELL, image.width)) for image, (_, text) in zip(images, cells, strict=True)]
    widths = [max(image.width, text.width) for image, text in zip(images, texts, strict=True)]
    head = LINE + GAP // 2
    tallest = max(image.height for image in images)
    height = head + tallest + GAP // 2 + max(text.height for text in texts)
    whole = PIL.Image.new("RGB", (sum(widths) + GAP * (len(cells) - 1), height), GROUND)
    PIL.ImageDraw.Draw(whole).text((0, 0), title, fill=FAINT, font=font())
    x = 0
    for image, text, width in zip(images, texts, widths, strict=True):
        whole.paste(image, (x, head))
        whole.paste(text, (x, head + tallest + GAP // 2))
        x += width + GAP
    return whole


def strip(document: Document) -> PIL.Image.Image:
    """One document from left to right, its parts centred on one line."""
    parts = [
        scaled(s.pixels) if isinstance(s, Image) else text_block(s.text if isinstance(s, Text) else "[IMG]", TEXT_WIDTH)
        for s in document.segments
    ]
    height = max((part.height for part in parts), default=LINE)
    width = sum(part.width for part in parts) + GAP * max(len(parts) - 1, 0)
    whole = PIL.Image.new("RGB", (max(width, 1), height), GROUND)
    x = 0
    for part in parts:
        whole.paste(part, (x, (height - part.height) // 2))
        x += part.width + GAP
    return whole


def stacked(parts: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures one below the other, with margins."""
    width = max((part.width for part in parts), default=CELL) + 2 * GAP
    height = sum(part.height + GAP for part in parts) + GAP
    whole = PIL.Image.new("RGB", (width, height), GROUND)
    y = GAP
    for part in parts:
        whole.paste(part, (GAP, y))
        y += part.height + GAP
    return whole


def scaled(pixels: np.ndarray) -> PIL.Image.Image:
    """Enlarged by the whole factor that makes the shorter side about CELL; large images are shrunk."""
    image = PIL.Image.fromarray(pixels)
    factor = max(1, min(round(CELL / min(image.size)), LONGEST_SIDE // max(image.size)))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), PIL.Image.Resampling.LANCZOS)
    return image


def text_block(text: str, width: int) -> PIL.Image.Image:
    """A text wrapped to `width` pixels."""
    lines = wrap(text, width)
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while font().getlength(f"{last} ...") > width and " " in last:
            last = last.rpartition(" ")[0]
        lines = [*lines[: LINES - 1], f"{last} ..."]
    whole = PIL.Image.new("RGB", (width, LINE * max(len(lines), 1)), GROUND)
    pen = PIL.ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        pen.text((0, number * LINE), line, fill=INK, font=font())
    return whole


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines that fit `width` pixels, inside a word only where it does not fit a line."""
    lines, line = [], ""
    for word in text.split():
        while font().getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font().getlength(word[:n]) <= width)
            lines += [line, word[:fits]] if line else [word[:fits]]
            line, word = "", word[fits:]
            if not word:
                break
        longer = f"{line} {word}".strip()
        if line and font().getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


@functools.cache
def font():
    """Pillow's own font (it has no glyphs for many scripts, which then show as boxes)."""
    return PIL.ImageFont.load_default(12)


def _save(sheet: PIL.Image.Image, path: str | Path | None) -> np.ndarray:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    return np.asarray(sheet)
