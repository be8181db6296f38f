"""Mistakes that published implementations of this kind of model have made, each as a test that would catch it here.

 1  sizes of generated images are obeyed                 8  a batch equals its documents drawn one by one
 2  captions do not depend on the seed                   9  an image prompt is written exactly as in training
 6  the unconditional prompt is that of training        10  what follows an image reads it clean, as in training
 7  patches know their places                           11  an image costs as many network evaluations as asked for

 5  a perfect model has no loss, 12 the loss does not grow with the channels, 13 the same seed gives the same loss:
    tests/training/test_step.py
 3, 4  are about a velocity-consistency loss, which this project does not have
14  is a list of features that were missing, which no test can show
"""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from sampling.reference import Reference

from mmdiff.data.batches import Batches, Choice
from mmdiff.document import IMG, Document, Text
from mmdiff.layout import ImagePiece, ImagePlan, text_pieces
from mmdiff.sampling import image
from mmdiff.sampling import session as sessions
from mmdiff.sampling.generate import Model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tiny_gau):
    return Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary)


@pytest.fixture(scope="module")
def reference(tiny_gau):
    return Reference(tiny_gau)


def traced_anew():
    """`image.draw` as a program of its own, which sees what a test has replaced; jit would reuse the trace of the other."""
    plain = image.draw.__wrapped__
    return jax.jit(lambda *arguments: plain(*arguments), static_argnums=(0, 1))


# 1


@pytest.mark.parametrize("size", [(2, 8), (8, 2), (4, 6), (2, 2)])
def test_1_forced_sizes_are_obeyed(model, size):
    """Wherever the image comes from: asked for by the prompt, or begun by the model."""
    asked = model.generate([Document("1", IMG)], image_size=size, max_tokens=0, steps=1)[0]
    assert asked.images[0].pixels.shape == (*size, 3)
    begun = model.generate([Document("1")] * 8, image_size=size, max_tokens=6, max_images=1, steps=1, temperature=2.0, seed=3)
    shapes = [i.pixels.shape for document in begun for i in document.images]
    assert shapes and set(shapes) == {(*size, 3)}


def test_1_sizes_that_the_model_writes_are_obeyed(model, tiny_gau, monkeypatch):
    """Its size tokens, as the text phase wrote them, against the pixels that came back."""
    written = []
    keep = sessions.Session._keep

    def spy(session, draft, tokens):
        if draft.mode == sessions.text.DRAW:
            written.append((tiny_gau.vocabulary.row_count(int(tokens[-2])), tiny_gau.vocabulary.col_count(int(tokens[-1]))))
        keep(session, draft, tokens)

    monkeypatch.setattr(sessions.Session, "_keep", spy)
    documents = model.generate([Document("1", IMG)] * 8, max_tokens=0, steps=1, temperature=2.0, seed=3)
    sizes = [(d.images[0].height // 2, d.images[0].width // 2) for d in documents]
    assert sizes == written and any(rows != cols for rows, cols in sizes) and len(set(sizes)) > 2


# 2


def test_2_captions_do_not_depend_on_the_seed(model, reference, new_picture):
    """Greedy captions are a function of the picture, with the cache and without."""
    prompts = [Document(new_picture(2, 3, seed=s)) for s in (1, 2, 3)]
    greedy = {"temperature": 0.0, "max_tokens": 5, "max_images": 0}
    captions = [[d.texts for d in model.generate(prompts, **greedy, seed=seed)] for seed in (0, 1, 99)]
    assert captions[0] == captions[1] == captions[2]
    options = model.options(**greedy)
    for prompt, texts in zip(prompts, captions[0], strict=True):
        events = reference.generate(prompt, jax.random.key(0), options, iter(()))
        written = [what for event, what in events if event == "token"]
        assert "".join(texts) == model.vocabulary.decode(written)
    pieces = lambda document: text_pieces(document, model.vocabulary, 2)
    different = np.abs(reference.logits(pieces(prompts[0])) - reference.logits(pieces(prompts[1]))).max()
    assert different > 1e-2  # the caption is about the picture: the network reads it


# 6


class Documents:
    """A source of the given documents."""

    def __init__(self, *documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def outline(self, index):
        return [s if isinstance(s, Text) else (s.height, s.width, s.learn) for s in self.documents[index].segments]

    def where(self, index):
        return f"document {index}"


def test_6_the_unconditional_prompt_is_that_of_training(model, tiny_gau, new_picture, monkeypatch):
    """What sampling feeds its second branch, token by token, against rows whose text was dropped in training."""
    first, second = new_picture(2, 3), new_picture(2, 2, seed=1)
    trained = Batches(Documents(Document("12", first, "3", second)), tiny_gau.vocabulary, tiny_gau.cfg)
    row = trained.laid(0, Choice(drop=True, trailing=False, swap=False, flip=False))
    stream = ~row.noised

    seen = []
    extend = sessions.extend

    def spy(network, params, cache, chunk):
        seen.append(chunk)
        return extend(network, params, cache, chunk)

    monkeypatch.setattr(sessions, "extend", spy)
    model.generate([Document("12", first, "3", IMG)], image_size=(4, 4), max_tokens=0, steps=1, guidance=2.0)
    prompt, unconditional = seen
    count = int(unconditional.counts[0])
    for name in ("tokens", "patches", "is_patch", "position", "cell"):
        np.testing.assert_array_equal(getattr(unconditional, name)[0, :count], getattr(row, name)[stream], err_msg=name)
    np.testing.assert_array_equal(unconditional.read[0, :count], row.context_end[stream])
    v = tiny_gau.vocabulary
    ids = unconditional.tokens[0, :count][~unconditional.is_patch[0, :count]].tolist()
    assert ids == [v.bos, v.img, v.rows(2), v.cols(3), v.end_img, v.img, v.rows(2), v.cols(2)]
    assert int(prompt.counts[0]) == count + 3  # the control: the conditional branch has its three tokens of text


# 7


def test_7_patches_know_their_places(model, monkeypatch):
    """The same noise in every patch: without positions the picture would be one patch repeated."""
    real = jax.random.normal
    same = lambda key, shape=(), *rest: np.zeros(shape) + real(key, shape[-1:]) if len(shape) == 2 else real(key, shape, *rest)
    monkeypatch.setattr(jax.random, "normal", same)
    monkeypatch.setattr(image, "draw", traced_anew())
    (document,) = model.generate([Document("1", IMG)], image_size=(6, 6), max_tokens=0, steps=2)
    patches = document.images[0].pixels.reshape(3, 2, 3, 2, 3).swapaxes(1, 2).reshape(9, -1)
    assert len({p.tobytes() for p in patches}) == 9


# 8


@pytest.mark.parametrize("positions", ["centred", "scaled", "corner", "raster"])
def test_8_a_batch_equals_its_documents_one_by_one(model, tiny_gau, new_picture, positions):
    """Mixed prompts, sizes chosen by the model, guidance: text equal, pixels within the rounding to 8 bits."""
    cfg = dataclasses.replace(tiny_gau.cfg, model=dataclasses.replace(tiny_gau.cfg.model, positions=positions))
    variant = Model(cfg, tiny_gau.params, tiny_gau.vocabulary)
    variant.network = model.network  # positions are host data: all variants share the compiled programs
    prompts = [Document("12", IMG), Document(new_picture(2, 3), "4"), Document("5", IMG, "6", IMG)]
    options = {"max_tokens": 4, "max_images": 1, "steps": 2, "guidance": 2.0}
    seeds = [11, 12, 13]
    together = variant.generate(prompts, **options, seed=seeds)
    sizes = set()
    for prompt, seed, one in zip(prompts, seeds, together, strict=True):
        (alone,) = variant.generate([prompt], **options, seed=[seed])
        assert alone.texts == one.texts and alone.extra == one.extra and len(alone.images) == len(one.images)
        for a, b in zip(alone.images, one.images, strict=True):
            assert a.pixels.shape == b.pixels.shape and np.abs(a.pixels.astype(int) - b.pixels).max() <= 1
        sizes |= {i.pixels.shape for i in one.images}
    assert len(sizes) > 1  # so that some were padded


def test_8_position_variants_differ(model, tiny_gau):
    """The control: the positions are really in use, in batches as alone."""
    drawn = []
    for positions in ("centred", "scaled", "corner", "raster"):
        cfg = dataclasses.replace(tiny_gau.cfg, model=dataclasses.replace(tiny_gau.cfg.model, positions=positions))
        variant = Model(cfg, tiny_gau.params, tiny_gau.vocabulary)
        variant.network = model.network
        drawn.append(variant.generate([Document("12", IMG)], image_size=(4, 6), max_tokens=0, steps=2)[0].images[0].pixels)
    assert len({pixels.tobytes() for pixels in drawn}) == 4


# 9


@pytest.mark.parametrize("positions", ["centred", "scaled", "corner", "raster"])
def test_9_an_image_prompt_is_written_exactly_as_in_training(tiny_gau, positions):
    cfg = dataclasses.replace(tiny_gau.cfg, model=dataclasses.replace(tiny_gau.cfg.model, positions=positions))
    tiny = dataclasses.replace(tiny_gau, cfg=cfg)
    variant = Model(cfg, tiny.params, tiny.vocabulary)
    session = sessions.Session(variant, [Document("1")], jax.random.split(jax.random.key(0), 1), variant.options(), None)
    pieces = tiny.pieces("12", (2, 3), "4", (3, 1), "5")
    for end in range(1, len(pieces) + 1):
        part = pieces[:end]
        if isinstance(part[-1], ImagePiece):  # to be drawn: announced in sampling, a noised block in training
            part = [*part[:-1], part[-1]._replace(patches=None)]
        images = [p for p in part if isinstance(p, ImagePiece)]
        plans = [ImagePlan(p.patches is not None, 1) for p in images]
        trained = tiny.lay(part, plans, end=False)
        sampled, place = session._stream(part)
        stream = ~trained.noised
        for name in ("tokens", "patches", "is_patch", "position", "cell", "context_start", "context_end"):
            np.testing.assert_array_equal(getattr(sampled, name), getattr(trained, name)[stream], err_msg=name)
        last = trained.position[stream][-1]
        assert place == last[0] == last[1]
        opened = int((trained.tokens == tiny.vocabulary.img).sum())
        assert opened == len(images)  # [IMG] and the size once per image
        assert int((trained.tokens == tiny.vocabulary.end_img).sum()) == sum(p.patches is not None for p in images)


# 10


def test_10_what_follows_an_image_reads_it_clean(model, reference, tiny_gau, monkeypatch):
    """Logits after an image was drawn, against a training row with its 8-bit pixels at u = 0."""
    after = []
    read = sessions.Session._read

    def spy(session):
        read(session)
        after.append((list(session.drafts[0].pieces), np.asarray(session.logits[0])))

    monkeypatch.setattr(sessions.Session, "_read", spy)
    model.generate([Document("12", IMG)], image_size=(4, 6), max_tokens=1, max_images=0, steps=3, seed=4)
    pieces, logits = after[1]
    assert isinstance(pieces[-1], ImagePiece) and pieces[-1].patches is not None
    np.testing.assert_allclose(logits, reference.logits(pieces), atol=TOLERANCE)
    for noisy in (0.05, 0.5):  # controls: an image shown as the solver left it before its end, or at half noise
        assert np.abs(logits - reference.logits(pieces, u_of_clean=noisy)).max() > 1e-3


# 11


@pytest.fixture
def evaluations(monkeypatch):
    """Counts documents put through the network by `draw`, call by call, as the compiled program runs."""
    counts = collections.Counter()
    predict = image._predict

    def counting(model, diffusion, cache, canvas, position, point, sigma):
        jax.debug.callback(functools.partial(counts.update, [point.shape[0]]))
        return predict(model, diffusion, cache, canvas, position, point, sigma)

    monkeypatch.setattr(image, "_predict", counting)
    monkeypatch.setattr(image, "draw", traced_anew())
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 4}, {1: 4}),
        ({"steps": 1}, {1: 1}),
        ({"steps": 5, "solver": "heun"}, {1: 5}),
        ({"steps": 6, "solver": "midpoint"}, {1: 5}),  # two per interval, one for the last: never more than asked for
        ({"steps": 4, "guidance": 3.0}, {2: 4}),
        ({"steps": 4, "guidance": 3.0, "guidance_interval": (0.02, 30.0)}, {2: 2, 1: 2}),
    ],
)
def test_11_an_image_costs_as_many_evaluations_as_asked_for(model, evaluations, options, expected):
    model.generate([Document("1", IMG)], image_size=(4, 4), max_tokens=0, **options)
    jax.effects_barrier()
    assert dict(evaluations) == expected


def test_the_list_is_complete():
    """Every number of the docstring that claims a test has one."""
    numbers = {int(name.split("_")[1]) for name in globals() if name.startswith("test_") and name.split("_")[1].isdigit()}
    assert numbers == {1, 2, 6, 7, 8, 9, 10, 11}
