"""Orders of an image's positions: each cell once, and what each of them is named for."""

import numpy as np
import pytest

from mmdiff.config import Config, ConfigError, Layout, Model
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.layout import ImagePiece, ImagePlan, lay_out, patch_cells, patch_positions
from mmdiff.orders import image_order

ORDERS = ("raster", "snake", "spiral", "centre", "hilbert", "random")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 5), (4, 4), (8, 8)])
def test_every_cell_comes_once(order, grid):
    assert sorted(image_order(order, *grid)) == list(range(grid[0] * grid[1]))


def apart(order, rows, cols):
    """How far each cell is from the one before, in rows plus columns."""
    return np.abs(np.diff(np.divmod(image_order(order, rows, cols), cols))).sum(0)


@pytest.mark.parametrize("order", ["snake", "spiral", "hilbert"])
def test_curves_never_jump(order):
    assert (apart(order, 8, 8) == 1).all()
    assert (apart("raster", 8, 8) > 1).any()


def test_they_are_what_they_are_called():
    np.testing.assert_array_equal(image_order("snake", 2, 3), [0, 1, 2, 5, 4, 3])
    np.testing.assert_array_equal(image_order("spiral", 3, 3), [0, 1, 2, 5, 8, 7, 6, 3, 4])
    np.testing.assert_array_equal(image_order("centre", 3, 3), [4, 1, 3, 5, 7, 0, 2, 6, 8])
    quadrants = image_order("hilbert", 4, 4).reshape(4, 4)  # a quarter of the curve fills a quarter of the image
    assert all(len({(cell // 8, cell % 4 // 2) for cell in quarter}) == 1 for quarter in quadrants)
    assert len({image_order(order, 8, 8).tobytes() for order in ORDERS}) == len(ORDERS)


def test_a_row_holds_codes_places_and_cells_in_that_order():
    layout = Layout(row_length=32, images="next_code", max_grid=4, order="spiral")
    vocabulary = Vocabulary.bytes(max_grid=4).with_codes(16)
    codes = np.arange(12, dtype=np.int32)
    row, _ = lay_out([ImagePiece(codes, 3, 4)], [ImagePlan(True, 0)], vocabulary, layout, patch_values=48)
    order, here = image_order("spiral", 3, 4), row.is_patch
    np.testing.assert_array_equal(row.tokens[here] - vocabulary.codes_range[0], codes[order])
    np.testing.assert_array_equal(row.cell[here], patch_cells(3, 4)[order])
    np.testing.assert_array_equal(row.position[here], patch_positions(3, 3, 4, "centred")[0][order])
    assert (row.tokens[here] - vocabulary.codes_range[0] != codes).any()


def test_an_order_that_nothing_follows_is_refused():
    with pytest.raises(ConfigError, match="layout.order='snake' has no meaning with layout.images='denoised'"):
        Layout(order="snake")
    with pytest.raises(ConfigError, match="layout.order='snake': model.sparse='strided'"):
        Config(
            model=Model(patch=1, sparse="strided", block="attention", width=64, head_width=32),
            layout=Layout(images="next_pixel", order="snake"),
        )
