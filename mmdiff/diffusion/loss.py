"""The diffusion loss: a weighted squared error at each position.

Without a weighting, the error is taken in the loss space, both sides converted with the same clip (prediction.py, (2)):

    (1) error = mean_P gain^2 (output - truth)^2        x-prediction, v-loss: (x_hat - x)^2 / max(u, clip)^2

A weighting says how much the squared error of x counts at SNR = (alpha/sigma)^2 and so fixes the loss for every loss
space: an error of x is one of eps times sigma/alpha, and one of v times u = sigma / (alpha + sigma). With the weights

    (2) min_snr        w_x = min(SNR, gamma)                     = alpha^2 / max(sigma^2, alpha^2 / gamma)
    (3) soft_min_snr   w_x = 1 / ((sigma/alpha)^2 + sd^2)        = alpha^2 / (sigma^2 + alpha^2 sd^2)
    (4) sigmoid        w_x = SNR sigmoid(bias - log SNR)         = alpha^2 / (sigma^2 + alpha^2 exp(-bias))

the weight on an error of eps is w_x sigma^2/alpha^2 (min(1, gamma/SNR) and sigmoid(bias - log SNR), as published) and
that on an error of v is w_x u^2. The network's own error gets the weight of its own space, where what could blow up has
cancelled: nothing is clipped, and `loss` makes no difference. Note that (4) is (3) with sd^2 = exp(-bias).

Shapes: output, x, eps are [..., P]; alpha and sigma broadcast against them (usually [..., 1]); errors [...] float32.
Sources: JiT arXiv 2511.13720; Min-SNR arXiv 2303.09556; soft-min-SNR arXiv 2401.11605 (HDiT); sigmoid arXiv 2410.19324
(SiD2).
"""

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.diffusion import prediction


def image_error(
    output: jax.Array, x: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array, diffusion: config.Diffusion
) -> jax.Array:
    """Weighted squared error of one network output per position; exactly zero where the output is perfect.

    With `reduction="mean"` it is averaged over the P values and the caller averages over an image's patches; with "sum"
    it is summed over the P values and the caller sums over the patches.

    Returns:
      float32 [...].
    """
    output, x, eps, alpha, sigma = (jnp.asarray(a, jnp.float32) for a in (output, x, eps, alpha, sigma))
    squared = jnp.square(output - prediction.truth(x, eps, diffusion.prediction))
    squared = squared * error_weight(alpha, sigma, diffusion)
    return squared.sum(-1) if diffusion.reduction == "sum" else squared.mean(-1)


def error_weight(alpha: jax.Array, sigma: jax.Array, diffusion: config.Diffusion) -> jax.Array:
    """What multiplies the squared error of the network's own prediction; finite for 0 <= u <= 1; shape of alpha.

    Raises:
      ConfigError: a weighting value that must be positive is not.
    """
    value = diffusion.weighting_value
    if diffusion.weighting in ("min_snr", "soft_min_snr") and value <= 0:
        raise config.ConfigError(
            f"diffusion.weighting_value={value} must be positive for diffusion.weighting={diffusion.weighting!r}."
        )
    match diffusion.weighting:
        case "none":
            source, target = diffusion.prediction, diffusion.loss
            return prediction.gain(alpha, sigma, source=source, target=target, clip=diffusion.clip) ** 2
        case "min_snr":
            divisor = jnp.maximum(sigma**2, alpha**2 / value)
        case "soft_min_snr":
            divisor = sigma**2 + alpha**2 * value**2
        case "sigmoid":
            divisor = sigma**2 + alpha**2 * jnp.exp(-value)
    match diffusion.prediction:
        case "x":
            return alpha**2 / divisor
        case "eps":
            return sigma**2 / divisor
        case "v":
            return (alpha * sigma / (alpha + sigma)) ** 2 / divisor
