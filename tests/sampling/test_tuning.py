"""Tuned grids: the search, what it is judged by, where it is kept and how sampling finds it."""

import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.diffusion import grids
from mmdiff.document import IMG, DataError, Document
from mmdiff.sampling.generate import Model
from mmdiff.sampling.tuning import FILE, Target, Tuned, descend, read_tuned, tune, write_tuned

LEVELS = np.array([80.0, 8.0, 1.0, 0.1])


def test_descent_finds_the_levels_of_a_bowl():
    best = np.log([80.0, 3.0, 0.5, 0.04])
    asked = []

    def score(sigmas):
        asked.append(sigmas)
        return 1 + np.sum((np.log(sigmas) - best) ** 2)

    found = descend(score, LEVELS)
    np.testing.assert_allclose(np.log(found), best, atol=0.05)
    assert found[0] == 80.0 and all(np.all(np.diff(sigmas) < 0) for sigmas in asked)
    flat = descend(lambda sigmas: 1.0, LEVELS)
    np.testing.assert_allclose(flat, LEVELS)
    crowd = descend(lambda sigmas: float(np.sum(np.abs(np.log(sigmas)))), LEVELS)  # all of them want to be 1
    assert np.all(np.diff(np.log(crowd)) <= -0.02 + 1e-9)


@pytest.fixture(scope="module")
def model(tiny_gau):
    return Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary)


@pytest.fixture(scope="module")
def targets(model):
    prompts = [Document("12", IMG), Document("345", IMG), Document(IMG)]
    return [Target(model, prompts, (4, 6), seed, guidance=1.0) for seed in (0, 1)]


def test_many_steps_come_near_the_reference_and_few_do_not(targets):
    errors = [targets[0].error("unipc2", grids.make_grid("uniform_logsnr", n, 80.0, 0.01)[:-1]) for n in (2, 8, 100, 200)]
    assert errors[0] > errors[1] > 3 * errors[2] and errors[3] == 0.0
    assert targets[0].reference.shape == (3 * 6 * 12,)
    assert not np.array_equal(targets[0].reference, targets[1].reference)


def test_tuning_lowers_the_error_where_it_searched_and_keeps_only_what_helps_elsewhere(targets):
    tuned = tune(*targets, "unipc2", 4)
    known = targets[0].known(4)
    assert targets[0].error("unipc2", tuned.sigmas) <= min(targets[0].error("unipc2", known[name]) for name in known)
    assert tuned.begun in known and len(tuned.sigmas) == 4
    assert tuned.error == targets[1].error("unipc2", tuned.sigmas) <= tuned.error_before

    class Contrary:
        """Judges the other way round."""

        error = staticmethod(lambda solver, sigmas: -targets[0].error(solver, sigmas))

    kept = tune(targets[0], Contrary, "unipc2", 4)
    np.testing.assert_array_equal(kept.sigmas, known[kept.begun])


def test_sampling_finds_what_was_kept(tmp_path, tiny_gau):
    tuned = Tuned([80.0, 2.0, 0.3], 0.1, 0.2, "uniform_u")
    write_tuned(tmp_path, "unipc2", 10, tuned._asdict())
    write_tuned(tmp_path, "unipc2", 3, tuned._asdict())
    write_tuned(tmp_path, "ddim", 3, tuned._asdict())
    found = read_tuned(tmp_path)
    assert found == {("unipc2", 3): tuned.sigmas, ("unipc2", 10): tuned.sigmas, ("ddim", 3): tuned.sigmas}
    model = Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary, tuned=found)
    assert model.options(steps=3).grid == "tuned" and model.options(steps=4).grid == "uniform_logsnr"
    assert model.options(steps=4, solver="ddim").grid == "uniform_u"
    assert model.options(steps=3, grid="uniform_u").grid == "uniform_u"
    np.testing.assert_array_equal(model.noise_levels(model.options(steps=3)), [80.0, 2.0, 0.3, 0.0])
    draws = lambda **options: model.generate([Document("1", IMG)], image_size=(4, 4), seed=0, **options)[0].images[0].pixels
    assert np.any(draws(steps=3) != draws(steps=3, grid="uniform_logsnr"))
    with pytest.raises(ConfigError, match=r"no grid was tuned for unipc2 with steps=5 \(there: ddim 3, unipc2 3, unipc2 10\)"):
        model.options(steps=5, grid="tuned")


@pytest.mark.parametrize("text", ["{", "[]", '{"unipc2": {"4": {}}}', '{"unipc2": {"4": {"sigmas": [1, 2]}}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"grids\.json is damaged .*; delete it, or make it again with mmdiff tune-grid"):
        read_tuned(tmp_path)
