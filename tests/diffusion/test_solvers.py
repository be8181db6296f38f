"""Solvers against exact probability-flow ODEs, published numbers and closed forms."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.diffusion import grids, solvers

from . import mixtures

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "solvers.json").read_text())
SIGMA_MAX, SIGMA_MIN = GOLDEN["sigma_max"], GOLDEN["sigma_min"]
DETERMINISTIC = ["ddim", "midpoint", "heun", "dpmpp_2m", "dpmpp_3m", "unipc2", "unipc3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A mixture, start noise, the exact end points, and a solver compiled once per number of evaluations."""

    mixture: mixtures.Mixture
    start: jax.Array
    exact: jax.Array
    run: object

    def error(self, table: solvers.Table) -> float:
        x_hat = self.run(self.start, table)
        return float(jnp.sqrt(jnp.mean((x_hat - self.exact) ** 2))) / self.mixture.std


@functools.cache
def problem(name: str) -> Problem:
    with jax.enable_x64(True):
        mixture = {"patch48": mixtures.patch48, "ring8": mixtures.ring8}[name]()
        noise = np.random.default_rng(GOLDEN["seed"]).standard_normal((GOLDEN["samples"], mixture.dim))
        start = jnp.asarray(SIGMA_MAX * noise)
        exact = mixtures.ode_endpoint(mixture, start, SIGMA_MAX, SIGMA_MIN, steps=300)
        return Problem(mixture, start, exact, jax.jit(lambda x, table: solvers.integrate(mixture.denoise, x, table)))


def make_table(solver, grid, budget):
    return solvers.make_table(solver, grids.make_grid(grid, grids.intervals(solver, budget), SIGMA_MAX, SIGMA_MIN))


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("name", ["patch48", "ring8"])
def test_golden_errors(name, solver):
    rows = [row for row in GOLDEN["rows"] if row[:2] == [name, solver]]
    assert len(rows) == 14
    with jax.enable_x64(True):
        for _, _, grid, budget, nfe, rel_rmse in rows:
            table = make_table(solver, grid, budget)
            assert len(table.level) == nfe
            assert problem(name).error(table) == pytest.approx(rel_rmse, abs=1e-5), (grid, budget)


def test_float32_agrees_with_float64():
    p = problem("patch48")
    for solver in DETERMINISTIC:
        for grid in ("uniform_logsnr", "uniform_u"):
            table = make_table(solver, grid, 10)
            with jax.enable_x64(True):
                wide = np.asarray(p.run(p.start, table))
            narrow = p.run(jnp.asarray(np.asarray(p.start), jnp.float32), table)
            assert narrow.dtype == jnp.float32
            assert np.sqrt(np.mean((narrow - wide) ** 2)) < 1e-3 * p.mixture.std, (solver, grid)


@pytest.mark.parametrize(("budget", "change"), [(4, 1e-2), (10, 1e-3)])
def test_a_wrong_first_corrector_shows(budget, change):
    """The golden numbers notice c2 = p/e instead of 1/2 on UniPC's first step, though only one coefficient is wrong."""
    with jax.enable_x64(True):
        table = make_table("unipc2", "uniform_u", budget)
        keep = table.level[1] / table.level[0]
        e, h = keep - 1, -np.log(keep)
        np.testing.assert_allclose(table.correct[1], [keep, 0, -e / 2, -e / 2, 0, 0], atol=1e-12)
        wrong = (-e / h - 1) / e
        correct = table.correct.copy()
        correct[1] = [keep, 0, -e * wrong, -e * (1 - wrong), 0, 0]
        p = problem("patch48")
        assert abs(p.error(dataclasses.replace(table, correct=correct)) - p.error(table)) > change


def test_ddim_is_euler_on_the_flow():
    with jax.enable_x64(True):
        p = problem("ring8")
        sigmas = grids.make_grid("uniform_u", 12, SIGMA_MAX, SIGMA_MIN)
        u = sigmas / (1 + sigmas)
        y = p.start * (1 - u[0])
        for u_now, u_next in itertools.pairwise(u):
            x_hat = p.mixture.denoise(y / (1 - u_now), u_now / (1 - u_now))
            y = y + (u_next - u_now) * (y - x_hat) / u_now
        np.testing.assert_allclose(solvers.solve(p.mixture.denoise, p.start, sigmas, "ddim"), y, atol=1e-12)


def test_unipc2_and_heun_match_their_textbook_loops():
    """The coefficient tables against loops written from the papers' equations, on a coarse grid."""
    with jax.enable_x64(True):
        p = problem("ring8")
        denoise, start = p.mixture.denoise, p.start[:64]
        sigmas = grids.make_grid("uniform_logsnr", 6, SIGMA_MAX, SIGMA_MIN)
        np.testing.assert_allclose(
            solvers.solve(denoise, start, sigmas, "unipc2"), _unipc2_loop(denoise, start, sigmas), atol=1e-12
        )
        np.testing.assert_allclose(
            solvers.solve(denoise, start, sigmas, "heun"), _heun_loop(denoise, start, sigmas), atol=1e-12
        )


def _unipc2_loop(denoise, x, sigmas):
    lam = -np.log(sigmas[:-1])
    outputs = [denoise(x, sigmas[0])]
    for i in range(len(sigmas) - 2):
        h = lam[i + 1] - lam[i]
        e = np.expm1(-h)
        first = sigmas[i + 1] / sigmas[i] * x - e * outputs[i]
        if i == 0:
            outputs.append(denoise(first, sigmas[1]))
            x = first - e * 0.5 * (outputs[1] - outputs[0])
            continue
        r = (lam[i - 1] - lam[i]) / h
        slope = (outputs[i - 1] - outputs[i]) / r
        outputs.append(denoise(first - e * 0.5 * slope, sigmas[i + 1]))
        phi2 = -e / h - 1
        phi3 = -phi2 / h - 0.5
        c = np.linalg.solve([[1, 1], [r, 1]], [phi2 / e, 2 * phi3 / e])
        x = first - e * (c[0] * slope + c[1] * (outputs[i + 1] - outputs[i]))
    return outputs[-1]


def _heun_loop(denoise, x, sigmas):
    u = sigmas / (1 + sigmas)
    y = x * (1 - u[0])
    for now, then in itertools.pairwise(u):
        v = (y - denoise(y / (1 - now), now / (1 - now))) / now
        euler = y + (then - now) * v
        if then == 0:
            return euler
        v_then = (euler - denoise(euler / (1 - then), then / (1 - then))) / then
        y = y + (then - now) * (v + v_then) / 2


@pytest.mark.parametrize(
    ("solver", "grid", "order"),
    [
        ("ddim", "uniform_logsnr", 1),
        ("dpmpp_2m", "uniform_logsnr", 2),
        ("dpmpp_3m", "uniform_logsnr", 2),  # its first two steps are of lower order
        ("heun", "uniform_u", 2),
        ("midpoint", "uniform_u", 3),  # on Gaussians
        ("unipc2", "uniform_logsnr", 3),
        ("unipc3", "uniform_logsnr", 3.88),
    ],
)
def test_convergence_order_on_a_gaussian(solver, grid, order):
    sigma_min = 0.02
    with jax.enable_x64(True):
        gauss = mixtures.gauss4()
        start = SIGMA_MAX * jnp.asarray(np.random.default_rng(0).standard_normal((256, 4)))
        run = jax.jit(lambda x, table: solvers.integrate(gauss.denoise, x, table))

        def error(n):
            if grid == "uniform_u":  # n steps down to sigma_min, then the jump to 0
                u = np.linspace(SIGMA_MAX / (1 + SIGMA_MAX), sigma_min / (1 + sigma_min), n)
                sigmas = np.append(u / (1 - u), 0)
            else:
                sigmas = grids.make_grid(grid, n, SIGMA_MAX, sigma_min)
            ratio = np.sqrt((gauss.variances + sigma_min**2) / (gauss.variances + SIGMA_MAX**2))
            exact = gauss.denoise(gauss.means + (start - gauss.means) * ratio, sigma_min)
            return float(jnp.sqrt(jnp.mean((run(start, solvers.make_table(solver, sigmas)) - exact) ** 2)))

        measured = np.log2(error(80) / error(160))
    assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *solvers.STOCHASTIC])
def test_ends_with_x_hat(solver):
    """A denoiser that knows the answer gives it exactly, for any number of evaluations; the last state is noisy."""
    answer = jnp.linspace(-1, 1, 7)
    start = SIGMA_MAX * jax.random.normal(jax.random.key(0), (7,))

    def noise(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (7,))

    for nfe in (1, 2, 3, 6):
        sigmas = grids.make_grid("uniform_logsnr", grids.intervals(solver, nfe), SIGMA_MAX, SIGMA_MIN)
        seen = solvers.solve(lambda point, sigma: answer, start, sigmas, solver, noise)
        np.testing.assert_array_equal(seen, answer)
    state = solvers.solve(lambda point, sigma: jnp.where(sigma > 0.011, answer, point), start, sigmas, solver, noise)
    assert jnp.max(jnp.abs(state - answer)) > 1e-3  # a sampler that returned its last state would not be exact


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *solvers.STOCHASTIC])
@pytest.mark.parametrize("nfe", [1, 2, 5, 10])
def test_budget_counts_network_evaluations(solver, nfe):
    calls = []
    sigmas = grids.make_grid("uniform_logsnr", grids.intervals(solver, nfe), SIGMA_MAX, SIGMA_MIN)

    def denoise(point, sigma):
        jax.debug.callback(lambda level: calls.append(float(level)), sigma, ordered=True)
        return point / (1 + sigma**2)

    solvers.solve(denoise, jnp.ones(3), sigmas, solver, lambda step: jnp.zeros(3)).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == solvers.evaluations(solver, sigmas)
    assert nfe - 1 <= len(calls) <= nfe
    assert np.all(np.diff(calls) <= 0)


def test_ancestral_samples_have_the_moments_of_the_data():
    gauss = mixtures.gauss4()
    n = 20000
    sigmas = grids.make_grid("uniform_logsnr", 400, SIGMA_MAX, 0.003)

    def normal(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (n, 4))

    @jax.jit
    def sample(scale):
        return solvers.solve(gauss.denoise, SIGMA_MAX * normal(1000), sigmas, "ddpm", lambda step: scale * normal(step))

    std = np.sqrt(gauss.variances[0])
    good = sample(1.0)
    # steps of 2.5 % in sigma make the samples 1 to 2 % too narrow; the Monte Carlo error is 0.5 %
    np.testing.assert_allclose((good.mean(0) - gauss.means[0]) / std, 0, atol=0.04)
    np.testing.assert_allclose(good.std(0) / std, 1, atol=0.03)
    bad = sample(0.5)  # the check can fail: half the noise
    assert np.max(np.abs(bad.std(0) / std - 1)) > 0.2


def test_ancestral_needs_noise():
    sigmas = grids.make_grid("uniform_logsnr", 3, SIGMA_MAX, SIGMA_MIN)
    with pytest.raises(ValueError, match="stochastic"):
        solvers.solve(lambda point, sigma: point, jnp.ones(3), sigmas, "ddpm")


def test_dpmpp_2m_sde_matches_its_textbook_loop():
    """And without the noise it does not: the check would notice."""
    with jax.enable_x64(True):
        p = problem("ring8")
        sigmas, start = grids.make_grid("uniform_logsnr", 7, SIGMA_MAX, SIGMA_MIN), p.start[:64]
        noises = jnp.asarray(np.random.default_rng(0).standard_normal((7, *start.shape)))
        x, before, h_before = start, None, None
        for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
            x_hat = p.mixture.denoise(x, s)
            if t == 0:
                break
            h = np.log(s / t)
            ahead = x_hat if before is None else x_hat + h / (2 * h_before) * (x_hat - before)
            x = t / s * np.exp(-h) * x - np.expm1(-2 * h) * ahead + t * np.sqrt(-np.expm1(-2 * h)) * noises[i]
            before, h_before = x_hat, h
        ours = solvers.solve(p.mixture.denoise, start, sigmas, "dpmpp_2m_sde", lambda step: noises[step])
        np.testing.assert_allclose(ours, x_hat, atol=1e-12)
        quiet = solvers.solve(p.mixture.denoise, start, sigmas, "dpmpp_2m_sde", lambda step: 0 * noises[step])
        assert np.abs(np.asarray(quiet) - x_hat).max() > 0.1


@pytest.mark.parametrize("sigmas", [[80.0, 1.0], [1.0, 2.0, 0.0], [0.0], [80.0, 80.0, 0.0]])
def test_a_grid_must_decrease_to_zero(sigmas):
    with pytest.raises(ValueError, match="decrease strictly"):
        solvers.make_table("ddim", np.array(sigmas))


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match="unknown solver 'euler'"):
        solvers.make_table("euler", np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="unknown solver 'euler'"):
        grids.intervals("euler", 3)


def test_the_network_is_traced_once_and_state_is_float32_for_a_bfloat16_network():
    traces = []

    def denoise(point, sigma):
        traces.append(point.dtype)
        return (point / (1 + sigma**2)).astype(jnp.bfloat16)

    for solver in DETERMINISTIC:
        traces.clear()
        x_hat = solvers.solve(denoise, jnp.ones(3), grids.make_grid("uniform_u", 4, SIGMA_MAX, SIGMA_MIN), solver)
        assert x_hat.dtype == jnp.float32
        assert traces == [jnp.float32]


@pytest.mark.parametrize("solver", ["ddpm_large", "ddpm"])
def test_the_ancestral_sampler_in_the_coordinates_of_its_source(solver):
    """z <- (z - beta^2 / beta_bar eps) / alpha + beta noise, on the table of 1000 steps, for a linear denoiser."""
    with jax.enable_x64(True):
        sigmas = grids.make_grid("ddpm_table", 1000, 80.0, 0.01)
        denoise = lambda x, sigma: x / (1 + sigma**2)  # of standard normal data
        noises = jnp.asarray(np.random.default_rng(0).standard_normal((1001, 7)))
        noise = lambda step: noises[step]
        start = sigmas[0] * noise(1000)
        ours = solvers.solve(denoise, start, sigmas, solver, noise)
    alpha = np.sqrt(1 - 0.02 * np.arange(1, 1001) / 1000)
    alpha_bar = np.cumprod(alpha)
    beta, beta_bar = np.sqrt(1 - alpha**2), np.sqrt(1 - alpha_bar**2)
    z = np.asarray(start) * alpha_bar[-1]
    for i in range(999, -1, -1):
        x_hat = z / alpha_bar[i] * alpha_bar[i] ** 2
        eps = (z - alpha_bar[i] * x_hat) / beta_bar[i]
        z = (z - beta[i] ** 2 / beta_bar[i] * eps) / alpha[i]
        if i:
            z = z + beta[i] * np.asarray(noises[999 - i])
    agree = np.allclose(ours, z, atol=1e-6)
    assert agree == (solver == "ddpm_large"), np.abs(np.asarray(ours) - z).max()
