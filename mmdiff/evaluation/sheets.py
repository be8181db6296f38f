"""Sample sheets: pictures of what the model draws and reads, with the texts under them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdiff.document import IMG, Document, Image, Text

CELL = 96  # pixels a side, at least; small images are enlarged by a whole factor
LINE = 11
GROUND = (250, 250, 248)
INK = (40, 40, 40)


def sample_sheet(model, batches, path: str | Path, count: int = 8) -> np.ndarray:
    """Draw `count` prompts and caption `count` held-out images; save and return the sheet, uint8 [h, w, 3].

    Prompts are `sampling.prompts`, or the texts before images in the data. Keys are fixed, so sheets of one run compare.
    """
    prompts, pictures = prompts_and_pictures(batches, count)
    if model.cfg.sampling.prompts:
        prompts = [Document(p, IMG) for p in model.cfg.sampling.prompts[:count]]
    rows = []
    if prompts:
        size = pictures[0].pixels.shape[:2] if pictures else None
        drawn = model.generate(prompts, seed=0, max_tokens=0, image_size=size)
        rows.append([(d.images[-1].pixels, "".join(d.texts)) for d in drawn])
    if pictures:
        told = model.generate([Document(p) for p in pictures], seed=0, temperature=0.0, max_images=0)
        rows.append([(p.pixels, "".join(t.texts) or "(nothing)") for p, t in zip(pictures, told, strict=True)])
    sheet = contact_sheet(rows, ("drawn from the text below", "captioned by the model"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image(sheet).save(path)
    return sheet


def prompts_and_pictures(batches, count: int) -> tuple[list[Document], list[Image]]:
    """Up to `count` prompts (what stands before a learnt image) and `count` images, from the first documents."""
    prompts, pictures = [], []
    for index in range(min(len(batches.source), 40 * count)):
        document = batches.source[index]
        for place, segment in enumerate(document.segments):
            if isinstance(segment, Image):
                before = document.segments[:place]
                if segment.learn and len(prompts) < count and before and all(isinstance(s, Text) for s in before):
                    prompts.append(Document(*before, IMG))
                if place == 0 or batches.cfg.data.order == "both":
                    pictures.append(segment)
                break
        if len(prompts) == count and len(pictures) >= count:
            break
    return prompts, pictures[:count]


def contact_sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]], titles: Sequence[str]) -> np.ndarray:
    """Rows of (pixels, text) with a title over each row; texts are wrapped to their image's width."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    font = PIL.ImageFont.load_default(9)
    gap = 8
    bands = []
    for cells, title in zip(rows, titles, strict=False):
        shown = [(enlarge(pixels), wrap(text, font, max(CELL, enlarge(pixels).shape[1]))) for pixels, text in cells]
        width = sum(max(CELL, p.shape[1]) + gap for p, _ in shown) + gap
        height = 18 + max(p.shape[0] for p, _ in shown) + max(len(lines) for _, lines in shown) * LINE + gap
        band = PIL.Image.new("RGB", (width, height), GROUND)
        pen = PIL.ImageDraw.Draw(band)
        pen.text((gap, 3), title, fill=(120, 120, 120), font=font)
        x = gap
        for pixels, lines in shown:
            band.paste(PIL.Image.fromarray(pixels), (x, 18))
            for number, line in enumerate(lines):
                pen.text((x, 18 + pixels.shape[0] + 2 + number * LINE), line, fill=INK, font=font)
            x += max(CELL, pixels.shape[1]) + gap
        bands.append(np.asarray(band))
    if not bands:
        return np.full((CELL, CELL, 3), 255, np.uint8)
    width = max(b.shape[1] for b in bands)
    padded = [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), mode="edge") for b in bands]
    return np.concatenate(padded)


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """By the whole factor that makes the shorter side about CELL."""
    factor = max(1, round(CELL / min(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def wrap(text: str, font, width: int) -> list[str]:
    """Break a text into lines that fit `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]
