"""What stands in the rows of every image path, who reads whom, and which losses fall where: by hand and by gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config
from mmdiff.document import Document
from mmdiff.image_paths import masked_code
from mmdiff.image_paths.base import image_path
from mmdiff.layout import pack, stack

from .tiny import COUNT, PATHS, logits_of, model, picture, pieces_of, rows_of

DOCUMENT = Document("ab", picture(0), "c")


def nats_of(logits, targets):
    """-log softmax, float64."""
    logits = np.asarray(logits, np.float64)
    highest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return total - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def test_a_row_of_codes_in_the_stream_by_hand():
    made = model("next_code")
    vocabulary = made.vocabulary
    rows = rows_of(made, DOCUMENT)
    codes = made.tokenizer.encode([picture(0).pixels])[0]
    assert codes.shape == (COUNT,)
    start = vocabulary.text_range[0]
    words = [start + ord("a"), start + ord("b")]
    stream = [vocabulary.bos, *words, vocabulary.img, vocabulary.rows(2), vocabulary.cols(4)]
    stream += [*(vocabulary.codes_range[0] + codes), vocabulary.end_img, start + ord("c"), vocabulary.eos]
    length = len(stream)
    assert rows.tokens[0, :length].tolist() == stream and not rows.tokens[0, length:].any()
    assert np.flatnonzero(rows.is_patch[0]).tolist() == list(range(6, 6 + COUNT))
    assert not rows.noised.any()
    np.testing.assert_array_equal(rows.context_end[0, :length], np.arange(1, length + 1))  # everything reads what came before
    assert np.flatnonzero(rows.image_weight[0]).tolist() == list(range(6, 6 + COUNT))
    np.testing.assert_allclose(rows.image_weight.sum(), 1, rtol=1e-6)
    assert np.flatnonzero(rows.text_weight[0]).tolist() == [1, 2, 3, 4, 5, length - 2, length - 1]


def test_a_masked_image_stands_as_a_noised_one_would():
    made, raw = model("masked_code"), model("read")
    raw_layout = dataclasses.replace(raw.cfg.layout, images="denoised")
    codes = rows_of(made, DOCUMENT)
    plain = dataclasses.replace(raw.cfg, layout=raw_layout)
    pixels = rows_of(dataclasses.replace(FakeModel(plain, raw.vocabulary), cfg=plain), DOCUMENT)
    for name in ("is_patch", "image", "noised", "position", "cell", "context_end", "block_end", "image_weight", "text_weight"):
        np.testing.assert_array_equal(getattr(codes, name), getattr(pixels, name), err_msg=name)
    clean, block = codes.is_patch & ~codes.noised, codes.noised
    np.testing.assert_array_equal(codes.tokens[clean], codes.tokens[block])
    assert codes.tokens[block].min() >= made.vocabulary.codes_range[0]


@dataclasses.dataclass(frozen=True)
class FakeModel:
    """What laying out needs of a model of raw patches."""

    cfg: config.Config
    vocabulary: object
    tokenizer: None = None


def test_an_image_that_is_only_read_has_no_weight_and_is_not_asked_for():
    made = model("read")
    rows = rows_of(made, DOCUMENT)
    assert not rows.image_weight.any() and not rows.noised.any() and rows.patches[rows.is_patch].any()
    tokens = rows.tokens[0, rows.text_weight[0] > 0].tolist()
    start = made.vocabulary.text_range[0]
    assert tokens == [start + ord("a"), start + ord("b"), start + ord("c"), made.vocabulary.eos]
    where = np.flatnonzero(rows.is_patch[0])
    np.testing.assert_array_equal(rows.context_end[0, where], where + 1)


@pytest.mark.parametrize("images", PATHS)
def test_who_reads_whom_by_gradients(images):
    """The gradient of one position's hidden state towards every input position is zero exactly where it may not read."""
    made = model(images)
    rows = rows_of(made, DOCUMENT)
    network = made.network
    bound = network.bind(made.params)
    u = jnp.zeros(rows.tokens.shape)
    x = rows.patches / np.float32(127.5) - 1
    embedded = bound.embed(rows.tokens, rows.is_patch, x, u, rows.cell)
    direction = jax.random.normal(jax.random.key(0), (network.cfg.width,))

    @jax.jit
    def influence(position):
        def value(inputs):
            hidden, _ = bound.stack(embedded._replace(x=inputs), rows.position, rows.mask)
            return hidden[0, position] @ direction

        return jnp.abs(jax.grad(value)(embedded.x)[0]).sum(-1)

    first = int(np.flatnonzero(rows.is_patch[0])[0])
    last = first + COUNT - 1
    for position in (2, first, first + 3, last, last + 2):
        reads = np.flatnonzero(np.asarray(influence(position)))
        whole = images == "masked_code" and first <= position <= last
        assert reads.tolist() == list(range(last + 1 if whole else position + 1)), (images, position)
    if images == "masked_code":
        block = np.flatnonzero(rows.noised[0])
        reads = np.flatnonzero(np.asarray(influence(int(block[2]))))
        assert reads.tolist() == [*range(first), *block.tolist()]


@pytest.mark.parametrize("block", ["attention", "gau"])
def test_the_loss_of_next_codes_by_hand(block):
    made = model("next_code", block=block)
    rows = rows_of(made, DOCUMENT, Document(picture(1), "xyz", picture(2)))
    losses = jax.jit(lambda rows: image_path(made.cfg.layout).losses(made.network, made.cfg, made.params, rows))(rows)
    nats = nats_of(logits_of(made, rows)[:, :-1], rows.tokens[:, 1:])
    by_image = [nats[b][rows.is_patch[b, 1:] & (rows.image[b, 1:] == k)].mean() for b, k in ((0, 1), (1, 1), (1, 2))]
    np.testing.assert_allclose(losses.image / losses.image_weight, np.mean(by_image), rtol=1e-5)
    text = (nats * rows.text_weight[:, 1:]).sum() / rows.text_weight.sum()
    np.testing.assert_allclose(losses.text / losses.text_weight, text, rtol=1e-5)


def test_the_loss_of_masked_codes_by_hand_and_blind_to_what_is_masked():
    made = model("masked_code", noised_copies=2)
    path, vocabulary = image_path(made.cfg.layout), made.vocabulary
    rows = rows_of(made, DOCUMENT, Document("q", picture(1)))
    (hide,) = path.noise(made.network, made.cfg, rows, jax.random.key(2))
    hide = np.asarray(hide)
    assert not hide[~rows.noised].any()
    losses = jax.jit(lambda rows, hide: path.losses(made.network, made.cfg, made.params, rows, hide))(rows, hide)
    tokens = np.where(hide, vocabulary.codes_range[1], rows.tokens)
    assert vocabulary.codes_range[1] == masked_code.mask_token(made.network) == vocabulary.size - 1
    nats = nats_of(logits_of(made, rows, tokens), rows.tokens)
    by_block = []
    for b in range(2):
        for start in np.unique(rows.block_start[b][rows.noised[b]]):
            inside = rows.noised[b] & (rows.block_start[b] == start)
            by_block.append(nats[b][inside & hide[b]].mean())
    assert len(by_block) == 4
    np.testing.assert_allclose(losses.image / losses.image_weight, np.mean(by_block), rtol=1e-5)
    # the inputs of masked positions do not depend on the codes there: only the targets do
    other = dataclasses.replace(rows, tokens=np.where(hide, vocabulary.codes_range[0], rows.tokens))
    seen = [np.where(hide, vocabulary.codes_range[1], r.tokens) for r in (rows, other)]
    np.testing.assert_array_equal(*seen)


def test_as_many_codes_are_masked_as_the_ratio_says_and_others_each_time():
    made = model("masked_code", noised_copies=3)
    laid = rows_of(made, Document("a", picture(0)), Document("a", picture(1)))
    used = int((laid.tokens[0] > 0).sum())
    single = [jax.tree.map(lambda a, n=n: a[n][:used], laid) for n in range(2)]
    rows = stack([pack(single, 128)] * 3)  # two documents a row: blocks do not start where the row does
    for ratio, count in ((1e-6, 1), (0.25, 2), (0.26, 3), (1.0, COUNT)):
        chosen = []
        for seed in range(8):
            order = jax.random.uniform(jax.random.key(seed), rows.tokens.shape)
            hide = np.asarray(masked_code.masked(rows, jnp.full(rows.tokens.shape, ratio), order))
            assert not hide[~rows.noised].any()
            for b in range(3):
                for start in np.unique(rows.block_start[b][rows.noised[b]]):
                    block = hide[b, start : start + COUNT]
                    assert block.sum() == count
                    chosen.append(tuple(block))
        assert len(set(chosen)) >= min(8, math.comb(COUNT, count))
    assert len(chosen) == 8 * 3 * 6
    ratios = [
        np.asarray(image_path(made.cfg.layout).noise(made.network, made.cfg, rows, jax.random.key(s))[0]) for s in range(40)
    ]
    share = np.mean([hide[rows.noised].mean() for hide in ratios])
    assert abs(share - 2 / math.pi) < 0.06 + 0.5 / COUNT  # the mean of the cosine, rounded up to whole codes


@pytest.mark.parametrize("images", PATHS)
def test_packing_changes_no_loss(images):
    made = model(images)
    path = image_path(made.cfg.layout)
    documents = [DOCUMENT, Document("q", picture(1), "rs")]
    apart = rows_of(made, *documents)
    used = [int(np.flatnonzero((apart.tokens[n] > 0) | apart.is_patch[n])[-1]) + 1 for n in range(2)]
    rows = [jax.tree.map(lambda a, n=n: a[n][: used[n]], apart) for n in range(2)]
    joined = stack([pack(rows, 64)])
    noise: tuple = ()
    hides: tuple = ()
    if images == "masked_code":
        hide = np.zeros(apart.tokens.shape, bool)
        for n in range(2):
            hide[n, np.flatnonzero(apart.noised[n])[1::2]] = True
        noise = (hide,)
        hides = (np.concatenate([hide[0, : used[0]], hide[1, : used[1]], np.zeros(64 - sum(used), bool)])[None],)
    of = lambda rows, noise: path.losses(made.network, made.cfg, made.params, rows, *noise)
    for one, other in zip(jax.tree.leaves(of(apart, noise)), jax.tree.leaves(of(joined, hides)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5)


def test_other_images_give_other_codes_and_pieces_hold_them():
    made = model("next_code")
    one, other = (pieces_of(made, Document(picture(seed)))[0].patches for seed in (0, 1))
    assert one.dtype == np.int32 and (one != other).any()
