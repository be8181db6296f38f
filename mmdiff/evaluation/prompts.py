"""What is asked of a model on held-out documents: images to draw, pictures to describe."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmdiff import config
from mmdiff.document import IMG, Document, Image, Text


class Drawing(NamedTuple):
    """A prompt that ends with IMG, and the image that stands there in the data."""

    prompt: Document
    image: Image


def drawings(source, cfg: config.Config, count: int) -> list[Drawing]:
    """The first learnt image of each document of `source`, with what stands before it; at most `count`.

    With `data.order="both"` the text of a pair stands before its image; a model of images alone is told nothing, and of a
    tokenizer the first image is wanted, learnt or not.
    """
    both, every = cfg.data.order == "both", cfg.model.network in config.TOKENIZERS
    found: list[Drawing] = []
    for document in _documents(source):
        for place, segment in enumerate(document.segments):
            if isinstance(segment, Image) and (segment.learn or every):
                swap = both and place == 0 and len(document.segments) == 2
                before = document.segments[1:] if swap else document.segments[:place]
                if not cfg.layout.markers:
                    before = []
                found.append(Drawing(Document(*before, IMG), segment))
                break
        if len(found) == count:
            break
    return found


def pictures(source, cfg: config.Config, count: int) -> list[tuple[Image, str]]:
    """Images that a text follows (or, with `data.order="both"`, that one goes with), and that text; at most `count`."""
    both = cfg.data.order == "both"
    found: list[tuple[Image, str]] = []
    for document in _documents(source):
        swap = both and len(document.segments) == 2 and isinstance(document.segments[1], Image)
        first, *rest = document.segments[::-1] if swap else document.segments
        if isinstance(first, Image) and rest and len(document.texts) == len(rest):
            found.append((first, "".join(document.texts)))
            if len(found) == count:
                break
    return found


def draw(model, wanted: Sequence[Drawing], **options) -> list[np.ndarray]:
    """Draw each prompt's image at the size of the real one: uint8 [h, w, 3] each."""
    drawn: dict[int, np.ndarray] = {}
    for size in sorted({(d.image.height, d.image.width) for d in wanted}):
        group = [i for i, d in enumerate(wanted) if (d.image.height, d.image.width) == size]
        made = model.generate([wanted[i].prompt for i in group], **options | {"image_size": size, "max_tokens": 0})
        drawn |= {i: document.images[-1].pixels for i, document in zip(group, made, strict=True)}
    return [drawn[i] for i in range(len(wanted))]


def describe(model, prompts: Sequence[Document], **options) -> list[str]:
    """What the model writes after each prompt, greedily and without drawing."""
    made = model.generate(prompts, **options | {"temperature": 0.0, "max_images": 0})
    return ["".join(added_texts(p, m)).strip() for p, m in zip(prompts, made, strict=True)]


def added_texts(prompt: Document, made: Document) -> list[str]:
    """The texts of a generated document that were not in its prompt."""
    return [s.text for s in made.segments[len(prompt.segments) :] if isinstance(s, Text)]


def _documents(source) -> Iterator[Document]:
    return (source[i] for i in range(len(source)))
