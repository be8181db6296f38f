"""The training loop in one process: what a run leaves behind, what it refuses, and how it stops."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mmdiff
from mmdiff import config
from mmdiff.cli.main import main
from mmdiff.config import Config, ConfigError
from mmdiff.config_files import replaced
from mmdiff.document import DataError
from mmdiff.layout import empty_row
from mmdiff.models.network import Network
from mmdiff.parallel.mesh import make_mesh
from mmdiff.training import guard, step
from mmdiff.training import state as train_state
from mmdiff.training.flops import training_flops
from mmdiff.training.loop import train
from mmdiff.training.metrics import read_metrics
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.run import build
from mmdiff.training.step import make_train_step
from mmdiff.training.workdir import check_same, check_workdir


def tiny_config(**training) -> Config:
    return Config(
        name="tiny",
        model=config.Model(width=48, depth=1, patch=8, key_width=16, lossless=False),
        layout=config.Layout(row_length=96, max_grid=4),
        data=config.Data(
            source="shapes", size=24, generator_image_size=24, max_objects=1, vocabulary="bytes", generator=(("draw", 1.0),)
        ),
        optimizer=config.Optimizer(learning_rate=2e-3, warmup=2),
        training=config.Training(
            **{"steps": 4, "batch_size": 2, "log_every": 2, "checkpoint_every": 2, "validate_every": 2, "validation_rows": 2}
            | {"sample_every": 0}
            | training
        ),
        sampling=config.Sampling(steps=1, max_tokens=2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, what `train` returned) of a whole run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(tiny_config(), workdir)


def test_a_run_leaves_its_configuration_vocabulary_checkpoints_and_metrics(finished):
    workdir, _ = finished
    assert Config.from_json((workdir / "config.json").read_text()) == tiny_config()
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]
    assert (workdir / "vocabulary.model").is_file() and not list(workdir.glob("*.part"))


def test_metrics_have_the_names_that_scripts_read(finished):
    workdir, returned = finished
    records = read_metrics(workdir)
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == [2, 4]
    for record in logged:
        assert {"step", "loss", "text_loss", "image_loss", "seconds", "grad_norm", "learning_rate"} <= set(record)
        np.testing.assert_allclose(record["loss"], record["text_loss"] + record["image_loss"], rtol=1e-6)
    held_out = [r for r in records if "x_error" in r]
    assert [r["step"] for r in held_out] == [2, 4]
    assert {k: v for k, v in held_out[-1].items() if k not in ("step", "seconds")} == returned
    assert all(0 < r["text_bits_per_byte"] < 20 for r in held_out)


def test_the_run_loads_as_a_model(finished):
    model = mmdiff.load(finished[0])
    last = mmdiff.load(finished[0], ema=False)
    assert model.cfg == tiny_config()
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (model.params, last.params)), strict=True))


def test_an_earlier_checkpoint_loads_and_guides(finished):
    workdir, _ = finished
    newest, earlier = mmdiff.load(workdir, weak=f"{workdir}:2"), mmdiff.load(workdir, step=2)
    kernels = [model.params["image"]["patch_in"]["kernel"] for model in (newest, newest.weak, earlier)]
    assert np.array_equal(kernels[1], kernels[2]) and not np.array_equal(kernels[0], kernels[1])
    with pytest.raises(mmdiff.DataError, match=r"no checkpoint of step 3 in .*; there are 2, 4"):
        mmdiff.load(workdir, step=3)


def test_a_run_begins_with_the_parameters_of_another(finished, tmp_path):
    """Averaged parameters, and everything else as in a new run; with its vocabulary."""
    cfg = replaced(tiny_config(seed=5), {"training.init": str(finished[0])})
    run = build(cfg, tmp_path / "run", make_mesh(cfg.mesh, cfg.training))
    state, ema = run.first_state(), mmdiff.load(finished[0]).network.restack(mmdiff.load(finished[0]).params)
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, ema)
    assert int(state.step) == 0 and jax.random.key_data(state.key)[1] == 5
    assert run.vocabulary.fingerprint == mmdiff.load(finished[0]).vocabulary.fingerprint
    with pytest.raises(mmdiff.DataError, match="no checkpoint in"):
        dataclasses.replace(run, cfg=replaced(cfg, {"training.init": str(tmp_path)})).first_state()


def test_few_step_training_from_the_command_line(finished, tmp_path, capsys):
    """--init alone takes the other run's configuration; what is learnt draws in few evaluations, resumes and loads."""
    workdir = tmp_path / "few"
    command = ["train", "--init", str(finished[0]), "--few-step", "--workdir", str(workdir), "--training.steps", "3"]
    assert main([*command, "--training.sample_every", "3"]) == 0
    cfg = Config.from_json((workdir / "config.json").read_text())
    assert (cfg.name, cfg.few_step.objective, cfg.sampling.solver, cfg.training.steps) == ("tiny", "meanflow", "few_step", 3)
    assert (workdir / "samples" / "0000003.png").is_file()
    model = mmdiff.load(workdir)
    assert model.options().solver == "few_step" and model.options(solver="unipc2").grid == "uniform_logsnr"
    assert np.any(np.asarray(model.params["image"]["step_in"]["kernel"]) != 0)
    assert model.generate([mmdiff.Document("a", mmdiff.IMG)], steps=1)[0].images
    assert main([*command, "--training.sample_every", "3"]) == 0 and "resuming" in capsys.readouterr().err
    assert main(["train", "--init", str(tmp_path / "nowhere"), "--workdir", str(tmp_path / "x")]) == 65
    assert "holds no run" in capsys.readouterr().err
    ratio = training_flops(cfg, 269) / training_flops(tiny_config(), 269)
    assert 1.55 < ratio < 5 / 3  # an evaluation more, and a derivative for the price of one, both without the text head


def test_a_finished_run_does_nothing_more(finished, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    train(tiny_config(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "resuming" in capsys.readouterr().err


def test_a_validation_that_a_kill_cut_off_is_made_up_for(finished, tmp_path):
    """The save of step 4 is there, its validation is not: the resumed run writes the very line."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    whole = read_metrics(workdir)
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert "x_error" in whole[-1] and whole[-1]["step"] == 4
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    assert train(tiny_config(), workdir) == finished[1]
    untimed = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert untimed(read_metrics(workdir)) == untimed(whole)


def test_reporting_may_change_between_runs_but_nothing_else(finished):
    workdir, _ = finished
    check_workdir(tiny_config(log_every=7, checkpoint_every=9, validate_every=0), workdir)
    for other, message in (
        (tiny_config(seed=1), r"training\.seed=0, not 1"),
        (tiny_config(steps=9), r"training\.steps=4, not 9"),
        (dataclasses.replace(tiny_config(), model=config.Model(width=192, patch=8)), r"model\.width=48, not 192"),
    ):
        with pytest.raises(ConfigError, match=message + ".*another --workdir"):
            check_workdir(other, workdir)


def test_changed_data_is_refused(finished, monkeypatch):
    with pytest.raises(DataError, match=r"the data has changed since the checkpoint \(one -> two\); use the data"):
        check_same({"vocabulary": "v", "data": "one"}, {"vocabulary": "v", "data": "two"}, Path("w"))


def test_divergence_stops_the_run_and_keeps_the_last_good_parameters(tmp_path, monkeypatch):
    """The real loop, its loss made infinite from the third step on."""
    real = step.make_train_step

    def broken(network, cfg, tx):
        real_step = real(network, cfg, tx)

        def poisoned(state, rows):
            bad = jax.numpy.where(state.step >= 2, jax.numpy.inf, 1.0)
            params = jax.tree.map(lambda p: p * bad, state.params)
            after, metrics = real_step(dataclasses.replace(state, params=params), rows)
            kept = jax.tree.map(lambda new, old: jax.numpy.where(state.step >= 2, old, new), after.params, state.params)
            return dataclasses.replace(after, params=kept), metrics

        return poisoned

    monkeypatch.setattr(step, "make_train_step", broken)
    cfg = tiny_config(steps=20, max_skips=3, log_every=1, validate_every=0)
    with pytest.raises(guard.Diverged, match=r"step 5: no finite loss .* for 3 steps in a row"):
        train(cfg, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert [np.isfinite(r["loss"]) for r in records] == [True, True, False, False]
    model = mmdiff.load(tmp_path / "run")
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(model.params))


def test_an_example_sheet_is_drawn(tmp_path):
    cfg = tiny_config(steps=1, sample_every=1, validate_every=0)
    train(cfg, tmp_path / "run")
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1


def test_flops_agree_with_the_compiler():
    """XLA's own count of the compiled step, which includes what is not a matrix product."""
    cfg = dataclasses.replace(tiny_config(), model=config.Model(width=192, depth=2, patch=8))
    tx, _ = make_optimizer(cfg.optimizer, 10)
    network = Network(cfg.model, 269)
    state = jax.eval_shape(lambda: train_state.create(network.init(jax.random.key(0)), tx, 0))
    one = empty_row(96, 192)
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), one)
    counted = jax.jit(make_train_step(network, cfg, tx)).lower(state, rows).compile().cost_analysis()["flops"]
    assert 0.8 < training_flops(cfg, 269) / counted < 1.05


def test_a_trace_of_chosen_steps_and_an_account_of_the_time(tmp_path, capsys):
    train(tiny_config(validate_every=0), tmp_path / "run", profile=(2, 3))
    assert any((tmp_path / "run" / "profile").rglob("*.pb"))
    account = json.loads((tmp_path / "run" / "goodput.json").read_text())["now"]
    assert account["compile"] > 0 and account["checkpoint"] > 0 and account["lost"] == 0
    assert "goodput" in capsys.readouterr().err
    assert all(r["data_wait"] >= 0 for r in read_metrics(tmp_path / "run"))


def test_a_session_does_not_count_the_waiting_of_those_before(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "4")  # so that it goes on at step 2
    path = run / "goodput.json"
    account = json.loads(path.read_text())
    for seconds in (account["now"], *account["saves"].values()):
        seconds["data"] += 1000
    path.write_text(json.dumps(account))
    train(tiny_config(), run)
    assert "resuming" in capsys.readouterr().err
    waited = [record["data_wait"] for record in read_metrics(run) if "data_wait" in record]
    assert len(waited) == 2 and max(waited) < 100
    assert json.loads(path.read_text())["now"]["data"] > 1000
