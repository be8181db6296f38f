"""Metrics on the generator `shapes`, whose pictures and captions can both be read back exactly.

Every metric makes its own held-out documents (of the configuration's split, image size and number of things), so that
each rests on `count` documents whatever the mix the model was trained on. Attribute accuracy is that of
mmdiff/data/shapes_reader.py: missing and superfluous things count as wrong, random attributes score about 0.3.
"""

from mmdiff.data.shapes import Shapes
from mmdiff.data.shapes_reader import attribute_accuracy, caption_exact, read_scene, score_caption
from mmdiff.document import IMG, Document, Image, Text
from mmdiff.evaluation.prompts import Drawing
from mmdiff.evaluation.task import Task, mean


def caption_accuracy(task: Task) -> dict[str, float]:
    """`caption_accuracy`: attribute accuracy of greedy captions; `caption_exact`: share that say exactly the scene."""
    documents = held_out(task, "caption")
    texts = task.describe([Document(d.images[0]) for d in documents])
    scenes = [d.extra["scene"] for d in documents]
    accuracy = [score_caption(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    exact = [caption_exact(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    return mean("caption_accuracy", accuracy) | mean("caption_exact", exact)


def image_accuracy(task: Task) -> dict[str, float]:
    """`image_accuracy`: attribute accuracy of images drawn from captions, or given back by a tokenizer; `image_exact`: share
    that show the scene."""
    documents = held_out(task, "draw")
    drawn = task.draw([Drawing(Document(d.texts[0], IMG), d.images[0]) for d in documents])
    return _scored("image", drawn, [d.extra["scene"] for d in documents])


def question_accuracy(task: Task) -> dict[str, float]:
    """`question_accuracy`: share of questions about a picture whose greedy answer is the right one, word for word."""
    documents = held_out(task, "question")
    answers = task.describe([Document(*d.segments[:2]) for d in documents])
    return mean("question_accuracy", [a == d.extra["answer"] for a, d in zip(answers, documents, strict=True)])


def edit_accuracy(task: Task) -> dict[str, float]:
    """`edit_accuracy`: attribute accuracy of edited images against what the instruction leads to; `edit_exact`: share
    that show it exactly; `edit_accuracy_of_copy`: what returning the image unchanged would score."""
    documents = held_out(task, "edit")
    drawn = task.draw([Drawing(Document(*d.segments[:2], IMG), d.images[1]) for d in documents])
    copy = [attribute_accuracy(d.extra["scene"], d.extra["target"]) for d in documents]
    result = _scored("edit", drawn, [d.extra["target"] for d in documents])
    return result | {"edit_accuracy_of_copy": mean("edit", copy)["edit"]}


def interleaved_validity(task: Task) -> dict[str, float]:
    """Whether the model draws where it should, and stops, when nothing but its own tokens decides.

    `interleaved_validity`: the first text of a story is continued freely, at the configuration's temperature. Valid is
    a document of text, image, text, image, text, both images of the data's size, that the model ends itself ([EOS]).
    Adjoining texts count as one: more may be said about the scene before the image.
    `caption_validity`: an image alone is continued likewise. Valid is one text, no further image, and [EOS].
    """
    stories, captions = held_out(task, "story"), held_out(task, "caption")
    size = stories[0].images[0].height, stories[0].images[0].width
    tokens = 2 * max(sum(len(task.model.vocabulary.encode(text)) for text in d.texts) for d in stories)
    options = task.drawing | {"seed": task.seed, "max_tokens": tokens}
    told = task.model.generate([Document(d.segments[0]) for d in stories], **options)
    said = task.model.generate([Document(d.segments[0]) for d in captions], **options)
    story = [outline(d) == [Text, Image, Text, Image, Text] and _all_of(size, d) and ended(d) for d in told]
    caption = [outline(d) == [Image, Text] and ended(d) for d in said]
    return mean("interleaved_validity", story) | mean("caption_validity", caption)


def held_out(task: Task, kind: str) -> list[Document]:
    """`task.count` held-out documents of one kind; the same for every run of these settings."""
    data = task.model.cfg.data
    made = Shapes(0, task.count, data.generator_image_size, data.max_objects, ((kind, 1.0),), data.validation_split)
    return [made[i] for i in range(task.count)]


def outline(document: Document) -> list[type]:
    """The kinds of a document's segments, adjoining texts taken as one."""
    kinds: list[type] = []
    for kind in map(type, document.segments):
        if kind is not Text or kinds[-1:] != [Text]:
            kinds.append(kind)
    return kinds


def ended(document: Document) -> bool:
    return bool(document.extra.get("ended"))


def _all_of(size: tuple[int, int], document: Document) -> bool:
    return all((image.height, image.width) == size for image in document.images)


def _scored(name: str, drawn, scenes) -> dict[str, float]:
    read = [read_scene(pixels) for pixels in drawn]
    accuracy = [attribute_accuracy(r, wanted) for r, wanted in zip(read, scenes, strict=True)]
    exact = [r == wanted for r, wanted in zip(read, scenes, strict=True)]
    return mean(f"{name}_accuracy", accuracy) | mean(f"{name}_exact", exact)
