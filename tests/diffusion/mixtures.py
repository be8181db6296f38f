"""Gaussian mixtures whose best denoiser is known exactly: the solvers' test problems.

    x ~ sum_k w_k N(m_k, diag c_k),   X = x + s eps
    (1) E[x | X] = sum_k p_k(X) (m_k + c_k / (c_k + s^2) (X - m_k))
    (2) p_k(X)  ~  w_k N(X; m_k, diag(c_k + s^2))

Shapes: X is [n, d]; k components.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    weights: np.ndarray  # [k]
    means: np.ndarray  # [k, d]
    variances: np.ndarray  # [k, d]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def std(self) -> float:
        """Root mean square of the marginal standard deviations."""
        centre = self.weights @ self.means
        return float(np.sqrt(np.mean(self.weights @ (self.variances + (self.means - centre) ** 2))))

    def denoise(self, points, sigma):
        """The exact E[x | X], equation (1)."""
        means, variances = (jnp.asarray(a, points.dtype) for a in (self.means, self.variances))
        precision = 1 / (variances + sigma**2)
        squared = (points**2) @ precision.T - 2 * points @ (means * precision).T + (means**2 * precision).sum(-1)
        log_weights = jnp.asarray(np.log(self.weights), points.dtype)
        p = jax.nn.softmax(log_weights + 0.5 * jnp.log(precision).sum(-1) - 0.5 * squared, axis=-1)
        shrink = variances * precision
        return p @ (means * (1 - shrink)) + points * (p @ shrink)


def ring8() -> Mixture:
    """Eight narrow modes on a circle in the plane."""
    angle = 2 * np.pi * np.arange(8) / 8
    means = 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return Mixture(np.full(8, 1 / 8), means, np.full((8, 2), 0.08**2))


def patch48() -> Mixture:
    """Sixteen components in 48 dimensions with an image-like power-law spectrum."""
    rng = np.random.default_rng(0)
    spectrum = (1.0 + np.arange(48)) ** -2
    spectrum *= 0.25 / spectrum.mean()
    means = np.sqrt(0.6 * spectrum) * rng.standard_normal((16, 48))
    variances = 0.4 * spectrum * np.exp(0.5 * rng.standard_normal((16, 48)))
    return Mixture(rng.dirichlet(np.full(16, 3.0)), means, variances)


def gauss4() -> Mixture:
    """One Gaussian, whose probability-flow ODE has a closed form."""
    return Mixture(np.ones(1), np.array([[0.3, -0.2, 0.0, 0.1]]), np.array([[1.0, 0.5, 0.2, 0.05]]) ** 2)


def ode_endpoint(mixture: Mixture, start, sigma_max: float, sigma_min: float, steps: int):
    """Denoised end of the probability-flow ODE dX/dlambda = E[x|X] - X, lambda = -log sigma, by Runge-Kutta 4."""
    lambdas = np.linspace(-np.log(sigma_max), -np.log(sigma_min), steps + 1)
    h = lambdas[1] - lambdas[0]

    def slope(point, lam):
        return mixture.denoise(point, jnp.exp(-lam)) - point

    def step(point, lam):
        k1 = slope(point, lam)
        k2 = slope(point + h / 2 * k1, lam + h / 2)
        k3 = slope(point + h / 2 * k2, lam + h / 2)
        k4 = slope(point + h * k3, lam + h)
        return point + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    end, _ = jax.jit(lambda p: jax.lax.scan(step, p, jnp.asarray(lambdas[:-1])))(start)
    return mixture.denoise(end, sigma_min)
