"""Metrics on the generator `words`: reading and writing, of the configuration's held-out split.

A picture has four attributes: its content (word or number), size, colour and place. See mmdiff/data/words.py.
"""

from mmdiff.data.words import Words, character_accuracy, parse_caption, read_words, writing_accuracy
from mmdiff.document import IMG, Document
from mmdiff.evaluation.prompts import Drawing
from mmdiff.evaluation.task import Task, mean


def read_accuracy(task: Task) -> dict[str, float]:
    """`read_accuracy`: attribute accuracy of greedy descriptions; `read_exact`: share with all four attributes right;
    `read_characters`: share of characters right (1 - edit distance / length)."""
    documents = _held_out(task, "read")
    texts = task.describe([Document(d.images[0]) for d in documents])
    return _scored("read", [parse_caption(text) for text in texts], documents)


def write_accuracy(task: Task) -> dict[str, float]:
    """`write_accuracy`, `write_exact`, `write_characters`: the same of pictures drawn from descriptions, or given back by a
    tokenizer, read back."""
    documents = _held_out(task, "draw")
    drawn = task.draw([Drawing(Document(d.texts[0], IMG), d.images[0]) for d in documents])
    return _scored("write", [read_words(pixels) for pixels in drawn], documents)


def _held_out(task: Task, kind: str) -> list[Document]:
    data = task.model.cfg.data
    made = Words(0, task.count, data.generator_image_size, ((kind, 1.0),), data.validation_split)
    return [made[i] for i in range(task.count)]


def _scored(name: str, read, documents: list[Document]) -> dict[str, float]:
    pairs = [(r, d.extra["writing"]) for r, d in zip(read, documents, strict=True)]
    result = mean(f"{name}_accuracy", [writing_accuracy(r, wanted) for r, wanted in pairs])
    result |= mean(f"{name}_exact", [r == wanted for r, wanted in pairs])
    return result | mean(f"{name}_characters", [character_accuracy(r, wanted) for r, wanted in pairs])
