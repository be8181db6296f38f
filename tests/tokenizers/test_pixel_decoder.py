"""Pixels by denoising: the loss is the written-out one, vectors decide what is drawn, and an image alone is as among others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmdiff.config import Diffusion, Model, Sampling
from mmdiff.parallel.sharding import Placement
from mmdiff.tokenizers.pixel_decoder import PixelDecoder, noise_for

CFG = Model(network="uvit", width=16, depth=1, patch=4, head_width=8, lossless=False, compute="float32")
CONDITIONS = jnp.array([[[1.0, -1.0, 0.5]], [[-1.0, 0.5, 1.0]]])
IMAGES = jnp.stack([jnp.full((8, 8, 3), -0.7), jnp.full((8, 8, 3), 0.7)]).at[:, :4, :4].set(0.0)


def make(steps: int = 3, solver: str = "unipc2") -> PixelDecoder:
    sampling = Sampling(steps=steps, solver=solver)
    return PixelDecoder(CFG, Diffusion(), sampling, (2, 2), (1, 3), nnx.Rngs(params=0), Placement(None))


@pytest.fixture(scope="module")
def learnt():
    """After some steps on two images, each with its vector."""
    graph, params = nnx.split(make())
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, number):
            params, opt_state = carry
            noise = noise_for(IMAGES, jnp.ones(2), jax.random.fold_in(jax.random.key(0), number))
            loss = lambda p: nnx.merge(graph, p).losses(IMAGES, CONDITIONS, *noise).mean()
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(300))

    (params, _), values = train(params)
    return nnx.merge(graph, params), values


def test_vectors_decide_what_is_drawn(learnt):
    model, values = learnt
    assert values[-50:].mean() < 0.3 * values[:20].mean()
    draw = jax.jit(model.draw)
    drawn, swapped = draw(CONDITIONS, jax.random.key(7)), draw(CONDITIONS[::-1], jax.random.key(7))
    far = lambda made: float(jnp.abs(made - IMAGES).mean())
    assert far(drawn) < 0.5 * far(swapped)
    np.testing.assert_allclose(drawn, swapped[::-1], atol=1e-5)  # an image does not depend on its place in the batch
    other = draw(CONDITIONS, jax.random.key(8))
    assert (other != drawn).any() and far(other) < 0.5 * far(swapped)


def test_the_loss_is_the_v_loss_of_the_prediction(learnt):
    """Errors of x over max(u, 0.05), squared, with u from the middle of the noise range."""
    model, _ = learnt
    seen = []

    class Watched(PixelDecoder):
        def __call__(self, z, u, condition):
            seen.append((z, u))
            return super().__call__(z, u, condition)

    _, params = nnx.split(model)
    watched = Watched(CFG, Diffusion(), Sampling(), (2, 2), (1, 3), nnx.Rngs(params=0), Placement(None))
    nnx.update(watched, params)
    found = watched.losses(IMAGES, CONDITIONS, *noise_for(IMAGES, jnp.ones(2), jax.random.key(3)))
    ((z, u),) = seen
    error = jnp.square(model(z, u, CONDITIONS) - IMAGES).reshape(2, -1).mean(-1) / jnp.maximum(u, 0.05) ** 2
    np.testing.assert_allclose(found, error, rtol=1e-4)
    assert u[0] > u[1]  # one from each half of the distribution


def test_images_that_count_share_the_times_among_them():
    """Whatever stands between them: padding takes no part of the range."""
    there = jnp.zeros(12).at[jnp.array([1, 2, 7, 11])].set(1.0)
    images = jnp.zeros((12, 8, 8, 3))
    numbers = np.stack([noise_for(images, there, jax.random.key(seed))[0][there > 0] for seed in range(50)])
    assert (np.floor(numbers * 4) == np.arange(4)).all() and np.ptp(numbers[:, 0]) > 0.2
    assert all(0 < r < 1 for r in noise_for(images, jnp.zeros(12), jax.random.key(0))[0])


def test_vectors_of_places_go_to_the_patches_there():
    """Without attention, which is cut, a patch knows of no vector but its own; of vectors without places it knows all."""

    def reached(square: bool, grid: tuple[int, int], count: int) -> np.ndarray:
        """bool [patches, vectors]: which vector a patch's prediction depends on."""
        model = PixelDecoder(CFG, Diffusion(), Sampling(), grid, (count, 3), nnx.Rngs(0), Placement(None), square=square)
        model.blocks = lambda x: x
        model.patch_out.kernel[...] = jax.random.normal(jax.random.key(1), model.patch_out.kernel.shape)
        size = 4 * grid[0], 4 * grid[1]
        made = lambda c: model(jnp.zeros((1, *size, 3)), jnp.full(1, 0.5), c[None])[0]
        slopes = jax.jacobian(made)(jax.random.normal(jax.random.key(2), (count, 3)))  # [h, w, 3, vectors, 3]
        cut = slopes.reshape(grid[0], 4, grid[1], 4, 3, count, 3)
        return np.asarray(jnp.abs(cut).max((1, 3, 4, 6)) > 1e-6).reshape(-1, count)

    np.testing.assert_array_equal(reached(True, (2, 2), 4), np.eye(4, dtype=bool))
    doubled = reached(True, (4, 4), 4)  # a coarser square: each patch has the nearest places'
    assert doubled[[0, 3, 12, 15]].tolist() == np.eye(4, dtype=bool).tolist() and doubled.any(0).all()
    assert reached(False, (2, 2), 4).all() and reached(False, (2, 2), 1).all()


def test_a_solver_with_noise_of_its_own_gives_equal_images_too(learnt):
    model, _ = learnt
    model.sampling = Sampling(steps=3, solver="dpmpp_2m_sde")
    one, two = (model.draw(CONDITIONS, jax.random.key(7)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
