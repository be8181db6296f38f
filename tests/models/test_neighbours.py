"""Operations on patches and what surrounds them, against the same on whole images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.config import Model
from mmdiff.layout import patch_cells, patchify, unpatchify
from mmdiff.models.neighbours import overlap_add, with_margin
from mmdiff.models.patches import ConvHead, between, sincos

GRIDS = [(2, 3), (3, 1)]  # two images in one row, with positions of no patch around them
SIDE = 4


def row_of(images):
    """Patches [1, t, s, s, c] and cells [1, t, 4] of images in one row, a gap before each."""
    channels = images[0].shape[-1]
    gap, nowhere = np.full((2, SIDE, SIDE, channels), 7.0, np.float32), np.zeros((2, 4), np.int32)
    patches, cells = [gap], [nowhere]
    for image, grid in zip(images, GRIDS, strict=True):
        cut = image.reshape(grid[0], SIDE, grid[1], SIDE, channels).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, channels)
        patches += [cut, gap]
        cells += [patch_cells(*grid), nowhere]
    return jnp.asarray(np.concatenate(patches))[None], jnp.asarray(np.concatenate(cells))[None]


def random_images(channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((r * SIDE, c * SIDE, channels)).astype(np.float32) for r, c in GRIDS]


def places(grid, start):
    return [(start + i, divmod(i, grid[1])) for i in range(grid[0] * grid[1])]


def test_a_margin_is_what_surrounds_the_patch_in_its_image():
    images, margin = random_images(), 2
    windows = np.asarray(with_margin(*row_of(images), margin))
    start = 2
    for image, grid in zip(images, GRIDS, strict=True):
        padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)])
        for t, (r, c) in places(grid, start):
            expected = padded[r * SIDE :, c * SIDE :][: SIDE + 2 * margin, : SIDE + 2 * margin]
            np.testing.assert_array_equal(windows[0, t], expected)
        start += grid[0] * grid[1] + 2
    outside = windows[0, :2].copy()
    outside[:, margin:-margin, margin:-margin] = 0
    assert not outside.any()  # where there is no patch there is nothing around it
    # control: the gaps hold sevens, so a neighbour taken from outside an image would have shown
    assert windows[0, 1, margin, margin, 0] == 7


def test_overlapping_windows_of_one_image_give_that_image_back():
    patches, cell = row_of(random_images())
    back = overlap_add(with_margin(patches, cell, 2), cell, 2)
    real = np.asarray(cell[0, :, 2] > 0)
    np.testing.assert_allclose(back[0, real], patches[0, real], atol=1e-6)


def test_overlap_add_is_the_weighted_mean_of_all_windows_over_a_pixel():
    margin = 1
    rng = np.random.default_rng(1)
    _, cell = row_of(random_images())
    windows = rng.standard_normal((1, cell.shape[1], SIDE + 2, SIDE + 2, 3)).astype(np.float32)
    ours = np.asarray(overlap_add(jnp.asarray(windows), cell, margin))
    ramp = np.array([0.25, 0.75, 1, 1, 0.75, 0.25])
    start = 2
    for grid in GRIDS:
        total = np.zeros((grid[0] * SIDE + 2, grid[1] * SIDE + 2, 3))
        weight = np.zeros((*total.shape[:2], 1))
        for t, (r, c) in places(grid, start):
            here = (slice(r * SIDE, r * SIDE + SIDE + 2), slice(c * SIDE, c * SIDE + SIDE + 2))
            each = (ramp[:, None] * ramp)[..., None]
            total[here] += each * windows[0, t]
            weight[here] += each
        image = (total / weight)[1:-1, 1:-1]
        for t, (r, c) in places(grid, start):
            np.testing.assert_allclose(ours[0, t], image[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE], atol=1e-5)
        start += grid[0] * grid[1] + 2
    assert np.abs(ours[0, 2] - windows[0, 2, 1:-1, 1:-1]).max() > 0.1  # control: neighbours matter


def test_the_convolutional_head_convolves_whole_images():
    head = ConvHead(Model(width=12, patch=SIDE, lossless=False, key_width=8), nnx.Rngs(params=0))
    head.second[...] = jax.random.normal(jax.random.key(1), head.second[...].shape)
    rng = np.random.default_rng(2)
    _, cell = row_of(random_images())
    hidden = jnp.asarray(rng.standard_normal((1, cell.shape[1], 12)), jnp.float32)
    ours = np.asarray(head(hidden, cell))
    features = np.asarray(head.features(hidden))[0]
    start = 2
    for grid in GRIDS:
        count = grid[0] * grid[1]
        part = features[start : start + count].reshape(*grid, SIDE, SIDE, -1)
        image = part.transpose(0, 2, 1, 3, 4).reshape(1, grid[0] * SIDE, grid[1] * SIDE, -1)
        for kernel in (head.first[...], head.second[...]):
            image = jax.lax.conv_general_dilated(
                jax.nn.silu(image), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        np.testing.assert_allclose(ours[0, start : start + count], patchify(np.asarray(image[0]), SIDE), atol=1e-4)
        start += count + 2
    alone = np.asarray(head(hidden, jnp.zeros_like(cell)))  # control: without neighbours it is another picture
    assert np.abs(alone - ours)[0, 2:8].max() > 0.1


@pytest.mark.parametrize(("at", "expected"), [([0, 0], 0), ([1, 2], 5), ([0.5, 0], 1.5), ([1, 1.25], 4.25), ([-3, 9], 2)])
def test_between_entries_of_a_table(at, expected):
    table = jnp.arange(9.0).reshape(3, 3, 1)
    np.testing.assert_allclose(between(table, jnp.asarray(at, jnp.float32)), [expected], atol=1e-6)


def test_fixed_features_tell_all_places_apart():
    features = np.asarray(sincos(jnp.asarray(patch_cells(16, 16)[:, :2]), 48))
    assert features.shape == (256, 48)
    assert (np.abs(features[:, None] - features[None]).max(-1) + np.eye(256)).min() > 0.1


def test_unpatchify_agrees_with_the_order_used_here():
    image = random_images()[0]
    patches, _ = row_of([image, random_images()[1]])
    np.testing.assert_array_equal(unpatchify(np.asarray(patches[0, 2:8]).reshape(6, -1), *GRIDS[0]), image)
