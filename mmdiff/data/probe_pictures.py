"""Pictures of the generator `probes`: pure functions of what they show, uint8 [side, side, 3].

Colours are three levels from 0 to 255, places are rows and columns in pixels. Edges are hard, save those of the clock:
a pixel at signed distance d from the edge of a stroke (inside: d > 0) is covered by clip(d + 1/2, 0, 1).

Glyph grids carry a known number of bits. A cell of c x c pixels is cut into 4 x 4 blocks; block k in raster order is
white where bit k of the cell's symbol is set (the least significant first), black where it is not, and grey for
k >= bits. Uniform symbols give an image of rows x cols cells an entropy of rows * cols * bits bits.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.data.words import CHARACTERS, GLYPHS
from mmdiff.document import DataError

Colour = tuple[int, int, int]
Place = tuple[int, int]
GRID = 8
"""Rows and columns of a grid of characters."""
BLOCKS = 4
"""Blocks along each side of a cell of a glyph grid."""
GREY = 128

_FONT = np.stack([GLYPHS[character] for character in CHARACTERS])


def two_colours(mask: np.ndarray, ink: Colour, ground: Colour) -> np.ndarray:
    """Ink where the mask is true; a mask of shares between 0 and 1 mixes the two."""
    share = mask[..., None].astype(np.float64)
    return np.rint(np.array(ground) + share * (np.array(ink) - np.array(ground))).astype(np.uint8)


def number(digits: str, corner: Place, dot: int, ink: Colour, ground: Colour, side: int) -> np.ndarray:
    """Digits side by side from their top left corner on, `dot` pixels per dot of the bitmap, a dot apart."""
    top, left = corner
    mask = np.zeros((side, side), bool)
    for i, digit in enumerate(digits):
        x = left + 6 * dot * i
        mask[top : top + 7 * dot, x : x + 5 * dot] = GLYPHS[digit].repeat(dot, 0).repeat(dot, 1)
    return two_colours(mask, ink, ground)


def dots(corners: Iterable[Place], diameter: int, ink: Colour, ground: Colour, side: int) -> np.ndarray:
    """Discs of a diameter; `corners` are the top left ones of the squares around them."""
    offset = np.arange(diameter) - (diameter - 1) / 2
    disc = offset[:, None] ** 2 + offset**2 <= (diameter / 2) ** 2
    mask = np.zeros((side, side), bool)
    for top, left in corners:
        mask[top : top + diameter, left : left + diameter] |= disc
    return two_colours(mask, ink, ground)


def swatch(box: tuple[int, int, int, int], colour: Colour, ground: Colour, side: int) -> np.ndarray:
    """A rectangle of one colour; `box`: top, left, height, width."""
    top, left, height, width = box
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = ground
    pixels[top : top + height, left : left + width] = colour
    return pixels


def clock(hour: int, minute: int, centre: Place, radius: int, ink: Colour, ground: Colour, side: int) -> np.ndarray:
    """A face with twelve marks, twelve o'clock on top; the thick short hand moves on with the minutes."""
    line = radius / 14  # width of the minute hand, half the width of the hour hand
    y, x = np.mgrid[:side, :side] + 0.5 - np.array(centre)[:, None, None]
    depths = [line / 2 - abs(np.hypot(x, y) - radius + line)]
    strokes = [(mark / 12, 0.85, 0.9, line / 2) for mark in range(12)]
    strokes += [((hour + minute / 60) / 12, 0.0, 0.5, line), (minute / 60, 0.0, 0.75, line / 2)]
    for turn, start, end, half in strokes:
        right, up = np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn)
        along = np.clip(x * right - y * up, start * radius, end * radius)
        depths.append(half - np.hypot(x - along * right, y + along * up))
    return two_colours(np.clip(np.max(depths, 0) + 0.5, 0, 1), ink, ground)


def characters(text: Sequence[str], ink: Colour, ground: Colour, side: int) -> np.ndarray:
    """GRID x GRID characters in raster order, each in the middle of a cell."""
    dot = side // GRID // 8
    glyphs = _FONT[[CHARACTERS.index(character) for character in text]]
    cells = np.pad(glyphs, ((0, 0), (0, 1), (1, 2))).reshape(GRID, GRID, 8, 8)
    return two_colours(_from_cells(cells).repeat(dot, 0).repeat(dot, 1), ink, ground)


def glyph_grid(symbols: np.ndarray, bits: int, cell: int) -> np.ndarray:
    """A picture of symbols: uint8 [rows * cell, cols * cell, 3].

    Args:
      symbols: integers [rows, cols] from 0 to 2^bits - 1.
      bits: per cell, 1 to 16. cell: its side in pixels, a multiple of 4.
    """
    _check_cells(bits, cell)
    symbols = np.asarray(symbols)
    if symbols.ndim != 2 or symbols.min() < 0 or symbols.max() >= 2**bits:
        raise DataError(f"symbols [rows, cols] of {bits} bits must lie between 0 and {2**bits - 1}.")
    blocks = np.full((*symbols.shape, BLOCKS**2), GREY, np.uint8)
    blocks[..., :bits] = (symbols[..., None] >> np.arange(bits) & 1) * 255
    scale = cell // BLOCKS
    grey = _from_cells(blocks.reshape(*symbols.shape, BLOCKS, BLOCKS)).repeat(scale, 0).repeat(scale, 1)
    return grey[..., None].repeat(3, 2)


def read_glyphs(pixels: np.ndarray, bits: int, cell: int) -> np.ndarray:
    """The inverse of `glyph_grid`, int64 [rows, cols]; a bit is set where the mean of its block is above the middle."""
    _check_cells(bits, cell)
    height, width = pixels.shape[:2]
    if height % cell or width % cell:
        raise DataError(f"a picture of {height}x{width} has no cells of {cell}x{cell}; change its size or cell.")
    rows, cols, scale = height // cell, width // cell, cell // BLOCKS
    blocks = np.asarray(pixels, np.float64).reshape(rows, BLOCKS, scale, cols, BLOCKS, scale, -1).mean((2, 5, 6))
    is_set = blocks.swapaxes(1, 2).reshape(rows, cols, -1)[..., :bits] > 255 / 2
    return (is_set.astype(np.int64) << np.arange(bits)).sum(-1)


def _from_cells(cells: np.ndarray) -> np.ndarray:
    """[rows, cols, h, w] as one picture [rows * h, cols * w]."""
    rows, cols, height, width = cells.shape
    return cells.swapaxes(1, 2).reshape(rows * height, cols * width)


def _check_cells(bits: int, cell: int) -> None:
    if not 1 <= bits <= BLOCKS**2:
        raise ConfigError(f"bits={bits} must be from 1 to {BLOCKS**2}: each takes one of a cell's blocks.")
    if cell < BLOCKS or cell % BLOCKS:
        raise ConfigError(f"cell={cell} must be a multiple of {BLOCKS}: a cell has {BLOCKS}x{BLOCKS} blocks.")
