"""A tokenizer on held-out images: what it gives back, and how much of its codebook it uses.

psnr               10 log10(255^2 / mean squared error of an image), dB, mean over images; pixels rounded to uint8
codes_used         share of the codebook that some code of these images takes
code_bits          entropy of how often each is taken, bits for each code; at most log2 of how many there are
bits_per_image     the same for a whole image
"""

import functools
from collections.abc import Callable
from typing import Any

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
    found: list[tuple[np.ndarray, ...]] = []
    for index in range(max(1, min(rows, batches.rows_per_epoch()) // size)):
        between()
        batch = batches.batch(index)
        if network.mesh is not None:
            batch = place_rows(batch, network.mesh)
        found.append(tuple(np.asarray(values, np.float64) for values in measure(network, params, batch)))
    psnr, error, weight = (np.concatenate(values) for values in list(zip(*found, strict=True))[:3])
    real = weight > 0
    result = {"validation_image_loss": float(error[real].mean()), "psnr": float(psnr[real].mean())}
    if network.quantizer.size:
        counts = np.sum([of_batch for *_, of_batch in found], axis=0)
        bits = float(codebook.entropy_bits(jnp.asarray(counts)))
        result |= {"codes_used": float(codebook.usage(jnp.asarray(counts))), "code_bits": bits}
        result["bits_per_image"] = bits * network.length
    return result


@functools.partial(jax.jit, static_argnames="network")
def measure(network: TokenizerNetwork, params: Any, rows: Rows) -> tuple[jax.Array, ...]:
    """Of each image [n]: psnr, error and whether it counts; and how often each code is taken [codes]."""
    images, weight = network.images(rows)
    model = network.bind(params)
    quantised = model.quantise(model.encode(images))
    made = model.decode(quantised.codes)
    levels = lambda x: jnp.clip(jnp.rint((x + 1) * 127.5), 0, 255)
    squared = jnp.square(levels(made) - levels(images)).reshape(len(images), -1).mean(-1)
    psnr = 10 * jnp.log10(255.0**2 / jnp.maximum(squared, 1e-2))
    each = jnp.broadcast_to(weight[:, None], quantised.ids.shape)
    counts = codebook.counts(quantised.ids, max(network.quantizer.size, 1), each)
    return psnr, image_error(network.tokenizer.error, made, images), weight, counts
