"""A tokenizer on held-out images: what it gives back, and how much of its codebook it uses.

psnr               10 log10(255^2 / mean squared error of an image), dB, mean over images; pixels rounded to uint8
codes_used         share of the codebook that some code of these images takes
code_bits          entropy of how often each is taken, bits for each code; at most log2 of how many there are
bits_per_image     the same for a whole image, of the mean length where images have different numbers of codes

and the means of what the network says besides of each image (`Seen.more`), with their standard deviations as NAME_std.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.layout import Rows
from mmdiff.parallel.mesh import place_rows
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.training import image_error


class Measured(NamedTuple):
    """Of each image of a batch [n], and how often each code is taken [codes]."""

    psnr: jax.Array
    error: jax.Array
    weight: jax.Array
    lengths: jax.Array
    more: dict[str, jax.Array]
    counts: jax.Array


def validate(
    network: TokenizerNetwork,
    cfg: config.Config,
    params: Any,
    batches: Batches,
    rows: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The numbers above, and `image_loss`, on the first `rows` held-out rows. `between` is called before each batch."""
    size = cfg.training.batch_size
    found: list[Measured] = []
    for index in range(max(1, min(rows, batches.rows_per_epoch()) // size)):
        between()
        batch = batches.batch(index)
        if network.mesh is not None:
            batch = place_rows(batch, network.mesh)
        found.append(jax.tree.map(lambda a: np.asarray(a, np.float64), measure(network, params, batch)))
    whole: Measured = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    real = whole.weight > 0
    result = {"validation_image_loss": float(whole.error[real].mean()), "psnr": float(whole.psnr[real].mean())}
    for name, values in whole.more.items():
        result |= {name: float(values[real].mean()), f"{name}_std": float(values[real].std())}
    if network.quantizer.size:
        counts = jnp.asarray(np.sum([batch.counts for batch in found], axis=0))
        bits = float(codebook.entropy_bits(counts))
        result |= {"codes_used": float(codebook.usage(counts)), "code_bits": bits}
        result["bits_per_image"] = bits * float(whole.lengths[real].mean())
    return result


@functools.partial(jax.jit, static_argnames="network")
def measure(network: TokenizerNetwork, params: Any, rows: Rows) -> Measured:
    """See Measured; what is drawn at random in coding is drawn as in use (model.py)."""
    images, weight = network.images(rows)
    seen = network.bind(params).seen(images, jax.random.key(0))
    levels = lambda x: jnp.clip(jnp.rint((x + 1) * 127.5), 0, 255)
    squared = jnp.square(levels(seen.made) - levels(images)).reshape(len(images), -1).mean(-1)
    psnr = 10 * jnp.log10(255.0**2 / jnp.maximum(squared, 1e-2))
    each = weight[:, None] * (jnp.arange(seen.ids.shape[1]) < seen.lengths[:, None])
    counts = codebook.counts(seen.ids, max(network.quantizer.size, 1), each)
    return Measured(psnr, image_error(network.tokenizer.error, seen.made, images), weight, seen.lengths, seen.more, counts)
