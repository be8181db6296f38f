"""The sequence: an independent reading of the design, segment by segment, against the intervals `lay_out` writes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.config import ConfigError, Layout
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.layout import (
    ImagePiece,
    IntervalMask,
    TextPiece,
    drop_text,
    laid_length,
    lay_out,
    pack,
    patch_positions,
    patchify,
    plan_images,
    stack,
    text_pieces,
    unpatchify,
)

VOCABULARY = Vocabulary.bytes(max_grid=4)
FIRST_TEXT = VOCABULARY.text_range[0]
P = 3
LONGEST = 640
KINDS = ("centred", "scaled", "corner", "raster")

texts = st.builds(
    lambda n, learn: TextPiece(FIRST_TEXT + np.arange(n, dtype=np.int32), learn), st.integers(1, 4), st.booleans()
)
images = st.builds(
    lambda r, c, learn: ImagePiece(np.full((r * c, P), 9, np.uint8), r, c, learn),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
pieces_of = st.lists(texts | images, min_size=1, max_size=7).filter(
    lambda pieces: sum(isinstance(p, ImagePiece) for p in pieces) <= 4
)
layouts = st.builds(Layout, context=st.just("clean"), noised_copies=st.integers(1, 2)) | st.just(Layout(context="noised"))


def lay(pieces, layout, trailing, positions="centred", dropped=False):
    plans = plan_images(pieces, layout, trailing)
    row, place = lay_out(pieces, plans, VOCABULARY, layout, patch_values=P, positions=positions, dropped=dropped)
    return row, plans, place


def dense(mask: IntervalMask, length: int) -> np.ndarray:
    """bool [length, length]; worked out at one size, so that JAX compiles once."""
    padded = IntervalMask(*(np.pad(leaf, (0, LONGEST - length)) for leaf in mask))
    return np.asarray(padded.dense(LONGEST))[:length, :length]


@dataclasses.dataclass
class Place:
    """What stands at one position, as the reference sees it."""

    kind: str  # text, clean, noised
    image: int = 0
    copy: int = 0


def reference(pieces, layout, trailing):
    """Every position of a document in order, written from the design alone."""
    stream, blocks = [Place("text")], []
    number = 0
    for index, piece in enumerate(pieces):
        if isinstance(piece, TextPiece):
            stream += [Place("text")] * len(piece.tokens)
            continue
        number += 1
        stream += [Place("text")] * 3
        in_place = layout.context == "noised" and piece.learn
        ends_unseen = index == len(pieces) - 1 and (in_place or not trailing)
        if in_place:
            stream += [Place("noised", number, 1)] * piece.patch_count
        elif not ends_unseen:
            stream += [Place("clean", number)] * piece.patch_count
        for copy in range(1, layout.noised_copies + 1):
            blocks += [Place("noised", number, copy)] * (piece.patch_count if piece.learn and not in_place else 0)
        if ends_unseen:
            return stream + blocks, len(stream)
        stream += [Place("text")]  # [/IMG]
    stream += [Place("text")]  # [EOS]
    return stream + blocks, len(stream)


def dense_reference(places, stream_length):
    """bool [T, T]: who reads whom, one pair at a time."""
    begins, ends = {}, {}  # of each image inside the stream
    for t, place in enumerate(places[:stream_length]):
        if place.image:
            begins.setdefault(place.image, t)
            ends[place.image] = t + 1
    mask = np.zeros((len(places), len(places)), bool)
    for q, query in enumerate(places):
        if query.kind == "text":
            stop = q + 1
        elif query.kind == "clean":
            stop = ends[query.image]
        else:  # the stream up to the size tokens; they end it where the image itself is not shown
            stop = begins.get(query.image, stream_length)
        for k, key in enumerate(places):
            own = query.kind == key.kind == "noised" and (query.image, query.copy) == (key.image, key.copy)
            mask[q, k] = k < min(stop, stream_length) or own
    return mask


@settings(max_examples=150, deadline=None)
@given(pieces=pieces_of, layout=layouts, trailing=st.booleans())
def test_mask_equals_a_reference_built_pair_by_pair(pieces, layout, trailing):
    row, _, _ = lay(pieces, layout, trailing)
    places, stream_length = reference(pieces, layout, trailing)
    assert len(row.tokens) == len(places)
    assert [p.kind != "text" for p in places] == row.is_patch.tolist()
    assert [p.kind == "noised" for p in places] == row.noised.tolist()
    assert [p.image for p in places] == row.image.tolist()
    expected = dense_reference(places, stream_length)
    assert np.array_equal(dense(row.mask, len(places)), expected)
    # One wrong interval is noticed.
    wrong = row.context_end.copy()
    wrong[len(wrong) // 2] -= 1
    broken = IntervalMask(row.context_start, wrong, row.block_start, row.block_end)
    if row.context_end[len(wrong) // 2] > 0 and not row.noised[len(wrong) // 2]:
        assert not np.array_equal(dense(broken, len(places)), expected)


@settings(max_examples=150, deadline=None)
@given(pieces=pieces_of, layout=layouts, trailing=st.booleans(), kind=st.sampled_from(KINDS))
def test_every_position_is_written_and_weighted(pieces, layout, trailing, kind):
    row, plans, place = lay(pieces, layout, trailing, kind)
    assert len(row.tokens) == laid_length(pieces, plans, layout)
    assert ((row.tokens != VOCABULARY.pad) ^ row.is_patch).all()
    assert (row.patches[row.is_patch] == 9).all() and (row.patches[~row.is_patch] == 0).all()
    learnt = [p for p in pieces if isinstance(p, ImagePiece)]
    for number, piece in enumerate(learnt, 1):
        assert row.image_weight[row.image == number].sum() == pytest.approx(float(piece.learn))
    assert (row.image_weight[~row.noised] == 0).all()
    assert (row.text_weight[row.is_patch] == 0).all()
    assert (row.text_weight[row.tokens == VOCABULARY.end_img] == 0).all()
    assert row.text_weight[0] == 0  # [BOS]
    if layout.context == "clean":
        assert (row.max_u == 1).all()
        stream = ~row.noised
        assert row.position[stream & ~row.is_patch].max() == place
        for number in range(1, len(learnt) + 1):  # every copy of an image stands at the same coordinates
            clean = row.position[(row.image == number) & ~row.noised]
            noised = row.position[(row.image == number) & row.noised]
            if len(clean) and len(noised):
                assert np.array_equal(np.concatenate([clean] * (len(noised) // len(clean))), noised)


def test_noised_context_caps_u_of_images_that_are_read():
    first, second = (ImagePiece(np.zeros((4, P), np.uint8), 2, 2) for _ in range(2))
    row, _, _ = lay([first, TextPiece(np.array([FIRST_TEXT])), second], Layout(context="noised", max_context_u=0.3), False)
    assert set(row.max_u[row.image == 1].tolist()) == {np.float32(0.3)}
    assert set(row.max_u[row.image == 2].tolist()) == {1.0}


def test_a_document_in_full():
    pieces = text_pieces(Document("ab", Image(np.zeros((4, 8, 3), np.uint8)), "c"), VOCABULARY, 4)
    row, place = lay_out(pieces, plan_images(pieces, Layout(), False), VOCABULARY, Layout(), patch_values=48)
    names = [VOCABULARY.name(int(t)) for t, p in zip(row.tokens, row.is_patch, strict=True) if not p]
    assert names == ["<bos>", "'a'", "'b'", "[IMG]", "<rows 1>", "<cols 2>", "[/IMG]", "'c'", "<eos>"]
    assert row.text_weight[~row.is_patch].tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 1]
    assert row.position[:, 0][~row.is_patch].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert place == 10 and row.is_patch.tolist() == [False] * 6 + [True] * 2 + [False] * 3 + [True] * 2
    assert row.noised.tolist() == [False] * 11 + [True] * 2


def test_text_drop_keeps_the_marker_and_sizes_without_loss():
    words = TextPiece(FIRST_TEXT + np.arange(3, dtype=np.int32))
    image = ImagePiece(np.zeros((2, P), np.uint8), 1, 2)
    pieces = drop_text([words, image, words])
    row, _, _ = lay(pieces, Layout(), False, dropped=True)
    start = [VOCABULARY.bos, VOCABULARY.img, VOCABULARY.rows(1), VOCABULARY.cols(2)]
    assert row.tokens[:4].tolist() == start and (row.text_weight[:4] == 0).all()
    assert row.text_weight.sum() == 4  # the text after the image, and [EOS]
    assert row.image_weight.sum() == pytest.approx(1)
    kept, _, _ = lay([words, image, words], Layout(), False)
    assert kept.text_weight.sum() == 10  # without dropping there is loss before the image: the check can fail
    read_only = [words, image._replace(learn=False)]
    assert drop_text(read_only) == read_only


# Positions: the three principles of kexue.fm/archives/10352, and the formulas.


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_one_dimensional(kind):
    row, _, _ = lay([TextPiece(FIRST_TEXT + np.arange(6, dtype=np.int32))], Layout(), False, kind)
    assert row.position.tolist() == [[t, t] for t in range(8)]


@settings(deadline=None)
@given(
    kind=st.sampled_from(["centred", "scaled"]),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    start=st.integers(0, 99),
)
def test_an_image_takes_the_room_of_its_patches_symmetrically(kind, rows, cols, start):
    where, resume = patch_positions(start, rows, cols, kind)
    assert resume == start + rows * cols + 1
    # Seen from the text before and from the text after, mirrored, the image is the same.
    assert np.allclose(where - start, (resume - where)[::-1], atol=1e-4)
    grid = where.reshape(rows, cols, 2)
    assert (np.ptp(grid[:, :, 0], axis=1) == 0).all() and (np.ptp(grid[:, :, 1], axis=0) == 0).all()
    assert (np.diff(grid[:, 0, 0]) > 0).all() and (np.diff(grid[0, :, 1]) > 0).all()


@pytest.mark.parametrize("kind", ["corner", "raster"])
def test_the_ablations_are_not_symmetric(kind):
    where, resume = patch_positions(5, 2, 3, kind)
    assert not np.allclose(where - 5, (resume - where)[::-1]) or kind == "raster"
    assert not (np.ptp(where[:3], axis=0)[0] == 0 and resume == 12)


def test_position_formulas():
    where = {kind: patch_positions(5, 2, 3, kind) for kind in KINDS}
    assert where["corner"][0].tolist() == [[6 + i, 6 + j] for i in range(2) for j in range(3)]
    assert where["corner"][1] == 5 + 1 + 3
    assert where["raster"][0].tolist() == [[6 + n, 6 + n] for n in range(6)] and where["raster"][1] == 12
    assert where["centred"][0].tolist() == [[8.5 + i - 0.5, 8.5 + j - 1] for i in range(2) for j in range(3)]
    scaled = [[5 + (i + 1) * 7 / 3, 5 + (j + 1) * 7 / 4] for i in range(2) for j in range(3)]
    assert np.allclose(where["scaled"][0], scaled)
    assert patch_positions(5, 1, 1, "scaled")[0].tolist() == patch_positions(5, 1, 1, "centred")[0].tolist() == [[6, 6]]


# Packing.


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(pieces_of, min_size=1, max_size=4), layout=layouts, padding=st.integers(0, 5))
def test_packing_keeps_documents_apart(documents, layout, padding):
    rows = [lay(pieces, layout, True)[0] for pieces in documents]
    sizes = [len(r.tokens) for r in rows]
    length = sum(sizes) + padding
    packed = pack(rows, length)
    expected = np.eye(length, dtype=bool)  # padding reads itself
    start = images_before = 0
    for row, size in zip(rows, sizes, strict=True):
        here = slice(start, start + size)
        expected[here, here] = dense(row.mask, size)
        for field in ("tokens", "patches", "is_patch", "noised", "position", "text_weight", "image_weight", "max_u"):
            assert np.array_equal(getattr(packed, field)[here], getattr(row, field)), field
        assert np.array_equal(packed.image[here], np.where(row.image > 0, row.image + images_before, 0))
        images_before += row.image.max()
        start += size
    assert np.array_equal(dense(packed.mask, length), expected)
    assert packed.text_weight[start:].sum() == packed.image_weight[start:].sum() == 0
    with pytest.raises(DataError, match=f"row_length={length - padding - 1}"):
        pack(rows, length - padding - 1)


def test_stack_makes_a_batch():
    row, _, _ = lay([TextPiece(np.array([FIRST_TEXT]))], Layout(), False)
    assert stack([row, row]).patches.shape == (2, 3, P)


# Images and texts.


@settings(deadline=None)
@given(rows=st.integers(1, 3), cols=st.integers(1, 3), patch=st.integers(1, 4))
def test_patchify_inverts(rows, cols, patch):
    pixels = np.random.default_rng(0).integers(0, 256, (rows * patch, cols * patch, 3), np.uint8)
    patches = patchify(pixels, patch)
    assert patches.shape == (rows * cols, 3 * patch**2)
    assert np.array_equal(unpatchify(patches, rows, cols), pixels)
    assert np.array_equal(patches[-1].reshape(patch, patch, 3), pixels[-patch:, -patch:])


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ConfigError, match=r"6x8 is not divisible by model\.patch=4; resize to 4x8"):
        text_pieces(Document(Image(np.zeros((6, 8, 3), np.uint8))), VOCABULARY, 4)
    with pytest.raises(DataError, match="marks a prompt"):
        text_pieces(Document("a", IMG), VOCABULARY, 4)
    with pytest.raises(ConfigError, match=r"5 patch rows does not fit layout\.max_grid=4"):
        lay([ImagePiece(None, 5, 1)], Layout(), False)
