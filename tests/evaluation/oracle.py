"""A stand-in for a model that knows some documents by heart, and one that mixes them up."""

from mmdiff import config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import IMG, Document, Image, Text
from mmdiff.sampling.generate import Model


class Oracle:
    """Continues every prompt as the first known document that begins with it goes on."""

    def __init__(self, cfg: config.Config, documents, ended: bool = True):
        self.cfg, self.documents, self.ended = cfg, list(documents), ended
        self.vocabulary = Vocabulary.bytes()
        self.calls: list[dict] = []

    options, path, tuned, weak, tokenizer = Model.options, Model.path, {}, None, None

    def generate(self, prompts, **options):
        self.calls.append(options)
        return [self._continue(prompt, **options) for prompt in prompts]

    def _continue(self, prompt: Document, max_tokens=64, max_images=4, **_) -> Document:
        asked = [s for s in prompt.segments if s is not IMG]
        known = next((d for d in self.documents if alike(d.segments[: len(asked)], asked)), None)
        assert known is not None, f"no document begins like {prompt}"
        added, images = [], sum(s is IMG for s in prompt.segments) + max_images
        for segment in known.segments[len(asked) :]:
            if isinstance(segment, Image):
                images -= 1
            if images < 0 or (isinstance(segment, Text) and not max_tokens):
                break
            added.append(segment)
        return Document(*asked, *added, extra={"ended": self.ended})


class Confused(Oracle):
    """Continues every prompt as the document after the right one goes on."""

    def _continue(self, prompt, **options):
        right = super()._continue(prompt, **options)
        asked = sum(s is not IMG for s in prompt.segments)
        places = [i for i, d in enumerate(self.documents) if alike(d.segments[: len(right.segments)], right.segments)]
        other = self.documents[(places[0] + 1) % len(self.documents)]
        return Document(*right.segments[:asked], *other.segments[asked : len(right.segments)], extra=right.extra)


def alike(some, others) -> bool:
    """Equal texts and pixels, whatever is to be learnt."""
    return len(some) == len(others) and all(
        type(a) is type(b) and (a.text == b.text if isinstance(a, Text) else (a.pixels == b.pixels).all())
        for a, b in zip(some, others, strict=True)
    )


class Listed:
    """A source of the documents given."""

    def __init__(self, documents):
        self.documents = list(documents)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def outline(self, index):
        return [s if isinstance(s, Text) else (s.height, s.width, s.learn) for s in self.documents[index].segments]

    def where(self, index):
        return f"document {index}"
