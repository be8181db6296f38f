"""Drawing codes against a cache gives what whole rows give; what a model cannot do is refused in one line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.image_paths.masked_code import CHOICE_TEMPERATURE
from mmdiff.layout import ImagePiece, ImagePlan, drop_text, lay_out, pack, stack
from mmdiff.orders import image_order
from tests.tokenizers.tiny import SIZE

from .tiny import COUNT, PATCH, logits_of, model, picture, pieces_of, rows_of

GREEDY = {"temperature": 0.0, "max_tokens": 0}
GRID = SIZE[0] // PATCH, SIZE[1] // PATCH


def key_of(seed, number=0):
    """Of image `number` of a document sampled alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 2**30 + number)


def laid(made, pieces, plan):
    """A row whose last image has this plan."""
    images = sum(isinstance(p, ImagePiece) for p in pieces)
    plans = [ImagePlan(True, 0)] * (images - 1) + [plan]
    layout = made.cfg.layout
    row, _ = lay_out(pieces, plans, made.vocabulary, layout, patch_values=3 * PATCH**2, end=False)
    return stack([pack([row], 64)])


def next_codes_by_whole_rows(made, pieces, scale, shift=0):
    """Greedy codes, one whole row for each; `shift` reads the logits of another position: the wrong way."""
    start, stop = made.vocabulary.codes_range
    order = image_order(made.cfg.layout.order, *GRID)
    drawn = np.zeros(COUNT, np.int32)
    run = jax.jit(lambda rows: logits_of(made, rows))
    for column in range(COUNT):
        found = []
        for branch in (pieces, drop_text(pieces)):
            rows = laid(made, [*branch[:-1], ImagePiece(drawn, *GRID)], ImagePlan(True, 0))
            first = int(np.flatnonzero(rows.is_patch[0] & (rows.image[0] == rows.image[0].max()))[0])
            found.append(np.asarray(run(rows)[0, first + column - 1 + shift, start:stop]))
        drawn[order[column]] = (found[1] + scale * (found[0] - found[1])).argmax()
    return drawn


@pytest.mark.parametrize(
    ("block", "scale", "sparse", "order"),
    [("attention", 1.0, "none", "spiral"), ("gau", 3.0, "none", "raster"), ("gau", 3.0, "strided", "raster")],
)
def test_next_codes_from_the_cache_are_those_of_whole_rows(block, scale, sparse, order):
    made = model("next_code", block=block, sparse=sparse, order=order)
    prompt = Document("abc", picture(3), "de", IMG)
    (out,) = made.generate([prompt], guidance=scale, **GREEDY)
    pieces = [*pieces_of(made, Document("abc", picture(3), "de")), ImagePiece(None, *GRID)]
    expected = next_codes_by_whole_rows(made, pieces, scale)
    np.testing.assert_array_equal(out.images[-1].pixels, made.tokenizer.decode(expected[None])[0])
    assert len(set(expected.tolist())) > 2
    wrong = next_codes_by_whole_rows(made, pieces, scale, shift=1)
    assert (wrong != expected).any()
    if scale != 1:
        assert (next_codes_by_whole_rows(made, pieces, 1.0) != expected).any()


def masked_codes_by_whole_rows(made, pieces, steps, scale, key, temperature=CHOICE_TEMPERATURE):
    """MaskGIT's loop over whole rows, in numpy."""
    start, stop = made.vocabulary.codes_range
    tokens = np.full(COUNT, stop, np.int64)
    run = jax.jit(lambda rows, tokens: logits_of(made, rows, tokens))
    for step in range(steps):
        found = []
        for branch in (pieces, drop_text(pieces)):
            rows = laid(made, [*branch[:-1], ImagePiece(np.zeros(COUNT, np.int32), *GRID)], ImagePlan(False, 1))
            given = rows.tokens.copy()
            given[rows.noised] = tokens
            found.append(np.asarray(run(rows, given)[0][rows.noised[0]], np.float64)[:, start:stop])
        logits = found[1] + scale * (found[0] - found[1])
        likely = logits.max(-1) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
        numbers = [jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), i))[1] for i in range(COUNT)]
        gumbel = np.asarray([jax.random.gumbel(number) for number in numbers])
        certain = likely + temperature * (1 - (step + 1) / steps) * gumbel
        hidden = tokens == stop
        left = 0 if step + 1 == steps else math.floor(COUNT * math.cos(math.pi / 2 * (step + 1) / steps))
        waiting = sorted(np.flatnonzero(hidden), key=lambda i: certain[i])
        for i in waiting[left:]:
            tokens[i] = start + logits[i].argmax()
        assert (tokens == stop).sum() == min(left, hidden.sum())
    return (tokens - start).astype(np.int32)


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (3, 2.0), (12, 1.0)])
def test_masked_codes_from_the_cache_are_those_of_whole_rows(steps, scale):
    made = model("masked_code")
    (out,) = made.generate([Document("abc", IMG)], guidance=scale, steps=steps, seed=4, **GREEDY)
    pieces = [*pieces_of(made, Document("abc")), ImagePiece(None, *GRID)]
    expected = masked_codes_by_whole_rows(made, pieces, steps, scale, key_of(4))
    np.testing.assert_array_equal(out.images[-1].pixels, made.tokenizer.decode(expected[None])[0])
    if steps == 3:
        assert (masked_codes_by_whole_rows(made, pieces, steps, scale, key_of(5)) != expected).any()
        assert (masked_codes_by_whole_rows(made, pieces, 1, scale, key_of(4)) != expected).any()


@pytest.mark.parametrize("images", ["next_code", "masked_code"])
def test_together_and_alone_are_the_same_and_a_seed_is_an_image(images):
    made = model(images)
    prompts = [Document("a", IMG), Document("longer", picture(1), "text", IMG, "b", IMG), Document(IMG)]
    options = {"guidance": 1.5, "max_tokens": 4, "max_images": 1, "temperature": 1.0}
    together = made.generate(prompts, seed=[0, 1, 2], **options)
    for prompt, seed, out in zip(prompts, (0, 1, 2), together, strict=True):
        (alone,) = made.generate([prompt], seed=[seed], **options)
        assert alone.texts == out.texts
        for one, other in zip(alone.images, out.images, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)
    (other,) = made.generate(prompts[:1], seed=[7], **options)
    assert (other.images[0].pixels != together[0].images[0].pixels).any()
    codes = made.tokenizer.encode([image.pixels for out in together for image in out.images if image.pixels.shape[:2] == SIZE])
    assert len(codes) >= 5


@pytest.mark.parametrize("images", ["next_code", "masked_code"])
def test_what_follows_a_drawn_image_is_told_by_its_codes(images):
    made = model(images)
    steps = {"steps": 2} if images == "masked_code" else {}
    (out,) = made.generate([Document("ab", IMG)], seed=1, max_tokens=3, max_images=0, temperature=0.0, **steps)
    pieces = [*pieces_of(made, Document("ab")), ImagePiece(None, *GRID)]
    if images == "masked_code":
        codes = masked_codes_by_whole_rows(made, pieces, 2, 1.0, key_of(1))
    else:
        codes = next_codes_by_whole_rows(made, pieces, 1.0)
    np.testing.assert_array_equal(out.images[0].pixels, made.tokenizer.decode(codes[None])[0])
    start, stop = made.vocabulary.text_range
    pieces[-1] = ImagePiece(codes, *GRID)
    written = []
    for _ in range(3):
        follow = pieces_of(made, Document(made.vocabulary.decode(written))) if written else []
        rows = laid(made, [*pieces, *[p._replace(tokens=np.asarray(written, np.int32)) for p in follow]], ImagePlan(True, 0))
        length = int((rows.tokens[0] > 0).sum())
        logits = np.asarray(logits_of(made, rows)[0, length - 1])
        if logits[made.vocabulary.eos] > logits[start:stop].max():
            break
        written.append(int(start + logits[start:stop].argmax()))
    assert "".join(out.texts[1:]) == made.vocabulary.decode(written)


def test_bits_of_codes_are_those_of_whole_rows():
    made = model("next_code")
    document = Document("ab", picture(0), "c", picture(1))
    (told,) = made.score([document])
    rows = rows_of(made, document)
    nats = -jax.nn.log_softmax(logits_of(made, rows)[0, :-1])
    nats = np.take_along_axis(np.asarray(nats), rows.tokens[0, 1:, None], 1)[:, 0]
    np.testing.assert_allclose(told["image_code_bits"], nats[rows.is_patch[0, 1:]].sum() / math.log(2), rtol=1e-5)
    assert told.keys() == {"text_nats_per_byte", "text_bits_per_byte", "image_code_bits"}
    assert "image_code_bits" not in made.score([Document("ab")])[0]
    (other,) = model("masked_code").score([document])
    assert other.keys() == {"text_nats_per_byte", "text_bits_per_byte"}


REFUSED = [
    ("next_code", {"steps": 20}, "steps=20"),
    ("next_code", {"solver": "ddim"}, "solver='ddim'"),
    ("masked_code", {"guidance_rescale": 0.5}, "guidance_rescale=0.5"),
    ("masked_code", {"autoguidance": 2.0}, "autoguidance=2.0"),
    ("read", {"guidance": 2.0}, "guidance=2.0"),
    ("next_code", {"image_size": (16, 16)}, "image_size=(16, 16)"),
]


@pytest.mark.parametrize(("images", "options", "told"), REFUSED)
def test_options_without_a_meaning_are_refused(images, options, told):
    with pytest.raises(ConfigError, match=told.replace("(", r"\(").replace(")", r"\)")) as problem:
        model(images).generate([Document("a", IMG)], **options)
    assert "\n" not in str(problem.value)


def test_what_a_model_cannot_do_is_said_in_one_line():
    with pytest.raises(DataError, match="prompt 2 asks for an image"):
        model("read").generate([Document("a"), Document("a", IMG)])
    (out,) = model("read").generate([Document(picture(0), "a")], max_tokens=8, max_images=4, temperature=1.0)
    assert len(out.images) == 1  # the one of the prompt: it never asks for another
    with pytest.raises(ConfigError, match="does not repaint"):
        model("next_code").inpaint(picture(0), np.ones(SIZE, bool))
    with pytest.raises(DataError, match="this tokenizer takes"):
        model("next_code").generate([Document(Image(np.zeros((4, 4, 3), np.uint8)), "a")], max_tokens=1)


def test_text_of_a_reading_model_is_that_of_whole_rows():
    made = model("read")
    (out,) = made.generate([Document("ab", picture(2))], max_tokens=3, temperature=0.0)
    start, stop = made.vocabulary.text_range
    written: list[int] = []
    for _ in range(3):
        text = [made.vocabulary.decode(written)] if written else []
        rows = laid(made, pieces_of(made, Document("ab", picture(2), *text)), ImagePlan(True, 0))
        if written:
            rows.tokens[0, np.flatnonzero(rows.tokens[0])[-len(written) :]] = written
        length = int(np.flatnonzero((rows.tokens[0] > 0) | rows.is_patch[0])[-1]) + 1
        logits = np.asarray(logits_of(made, rows)[0, length - 1])
        if logits[made.vocabulary.eos] > logits[start:stop].max():
            break
        written.append(int(start + logits[start:stop].argmax()))
    assert "".join(out.texts[1:]) == made.vocabulary.decode(written)
    assert jnp.isfinite(logits).all()
