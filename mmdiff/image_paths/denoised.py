"""Raw patches, denoised: the model that this project is about. The loss is in mmdiff/training/loss.py, the drawing in
mmdiff/sampling/image.py.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.diffusion import solvers
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.training.loss import Losses, block_steps, block_times, few_step_sums, loss_sums

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options

HEEDED: tuple[str, ...] = ("steps", "solver", "grid", "guidance", "guidance_interval", "guidance_rescale", "autoguidance")
VALIDATIONS = 1
MEASURED = "image_loss", 1.0
PURPOSES = {"times": 0, "noise": 1, "steps": 2}


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """Times u [b, t] and eps [b, t, p]; for few-step training lengths of steps h [b, t] between them."""
    u = block_times(rows, jax.random.fold_in(key, PURPOSES["times"]), cfg.diffusion)
    eps = jax.random.normal(jax.random.fold_in(key, PURPOSES["noise"]), rows.patches.shape, jnp.float32)
    eps = network.place(eps, "rows", None, None)
    if cfg.few_step.objective == "none":
        return u, eps
    return *block_steps(rows, u, jax.random.fold_in(key, PURPOSES["steps"]), cfg), eps


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    if cfg.few_step.objective != "none":
        return few_step_sums(network, cfg, params, rows, *noise)
    return loss_sums(network, cfg.diffusion, params, rows, *noise)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Patches uint8 [b, n, p].

    Raises:
      ConfigError: a solver that cannot work with these options.
    """
    from mmdiff.sampling import image

    weaker = model.weak.network if model.weak is not None and drawing.weak is not None else None
    try:
        table = solvers.make_table(options.solver, model.noise_levels(options))
    except ValueError as error:
        raise config.ConfigError(str(error)) from error
    return image.draw(model.network, model.cfg.diffusion, drawing, table, weaker)
