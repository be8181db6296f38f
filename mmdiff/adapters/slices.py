"""An image as the slices that its K positions carry: raw pixels, shared out evenly, whatever is made of them in the network.

    patches [n, p] of an image, in raster order  ->  [K, s p], s = ceil(n / K), zeros behind the last

So all pixels travel in the rows' own tensor, and packing and sharding need no second index. With K = n each position
carries its own patch. It stands where a tokenizer would (mmdiff/tokenizers/model.py), and loses nothing.
"""

from collections.abc import Sequence

import numpy as np

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.layout import patchify, unpatchify


class Slices:
    """To and from slices uint8 [n, K, s p] of images of one size."""

    dynamic = False  # always K of them

    def __init__(self, cfg: config.Config):
        size = cfg.fixed_size
        if size is None:
            raise config.ConfigError("a front end needs images of one size: set data.image_size.")
        self.size, self.grid, self.patch, self.values = size, cfg.front_end.grid, cfg.model.patch, cfg.patch_values

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal slices."""
        return f"slices {self.size} {self.grid} {self.patch}"

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Raises DataError for an image of another size."""
        for image in images:
            if image.shape != (*self.size, 3):
                raise DataError(f"an image {image.shape}: this model's front end takes {(*self.size, 3)}; resize it.")
        flat = np.stack([patchify(image, self.patch).reshape(-1) for image in images])
        count = self.grid[0] * self.grid[1]
        return np.pad(flat, ((0, 0), (0, count * self.values - flat.shape[1]))).reshape(len(flat), count, self.values)

    def decode(self, slices: np.ndarray) -> np.ndarray:
        """The inverse: images [n, h, w, 3] of any dtype. Also of traced arrays."""
        rows, cols = self.size[0] // self.patch, self.size[1] // self.patch
        flat = slices.reshape(len(slices), -1)[:, : 3 * self.size[0] * self.size[1]]
        return unpatchify(flat.reshape(len(slices), rows * cols, -1), rows, cols)
