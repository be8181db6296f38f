"""Sweeps and budgets as data: what is refused, in one line, and how a budget becomes a run."""

import dataclasses

import pytest

from mmdiff.cli.main import main
from mmdiff.config import Config, ConfigError, Model, Optimizer, Training
from mmdiff.sweeps.budget import fitted, parse
from mmdiff.sweeps.sweep import Sweep, load_sweep
from tests.sweeps.conftest import tiny_config, tiny_sweep


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [
        ("5m-per-arm", 600, "5 minutes"),
        ("90s-per-arm", 180, "1.5 minutes"),
        ("1h-per-arm", 7200, "1 hour"),
        ("0.2s-per-arm", 1, "0.2 seconds"),
        ("2000steps-per-arm", 2000, "2,000 steps"),
        ("1e15flops-per-arm", 500, "1e+15 FLOPs"),
        ("3E12flops-per-arm", 1, "3e+12 FLOPs"),
    ],
)
def test_budgets_become_steps(text, steps, words):
    budget = parse(text)
    assert budget.steps(step_seconds=0.5, flops_per_step=2e12) == steps
    assert budget.words == words


@pytest.mark.parametrize(
    "text", ["5m", "m-per-arm", "5 m-per-arm", "-5m-per-arm", "0s-per-arm", "5d-per-arm", "", "1e999s-per-arm"]
)
def test_what_is_no_budget_is_told_how_to_write_one(text):
    with pytest.raises(ConfigError, match=r"is no budget; write 5m-per-arm"):
        parse(text)
    with pytest.raises(ConfigError, match="whole"):
        parse("1.5steps-per-arm")


def test_a_run_follows_its_number_of_steps():
    cfg = fitted(tiny_config(), 3000, step_seconds=0.1, seed=4)
    t = cfg.training
    assert (t.steps, t.seed, t.validate_every, t.log_every) == (3000, 4, 200, 30)
    assert t.checkpoint_every == 600 and cfg.optimizer.warmup == 50 and t.sample_every == 0
    short = fitted(tiny_config(), 40, step_seconds=20.0)
    assert short.training.checkpoint_every == 3 and short.training.validate_every == 2 and short.optimizer.warmup == 4
    assert fitted(tiny_config(), 1, 1.0).training.steps == 1  # and nothing refuses it
    drawn = dataclasses.replace(tiny_config(), training=Training(sample_every=500, validation_rows=0))
    assert fitted(drawn, 3000, 0.1).training.sample_every == 3000
    assert fitted(drawn, 3000, 0.1).training.validation_rows > 0
    points = Optimizer(decay="points", points=((0, 0.0), (10, 1.0), (100, 0.5)))
    stretched = dataclasses.replace(tiny_config(), optimizer=points, training=Training(steps=100))
    assert fitted(stretched, 50, 1.0).optimizer.points == ((0, 0.0), (5, 1.0), (50, 0.5))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "ä", "a" * 65, "a\n"])
def test_names_that_are_no_folders_are_refused(name):
    with pytest.raises(ConfigError, match="is no name for an arm"):
        tiny_sweep(arms={"fine_1.0-b": tiny_config(), name: tiny_config()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "a\nb"}, "question="),
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"a": tiny_config(), "A": tiny_config()}}, "'a' and 'A' would share a folder"),
        ({"arms": {"a": Model()}}, "'a' is Model, not mmdiff.config.Config"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"metrics": "x_error"}, "must be a tuple of names"),
        ({"options": {"cuont": 3}}, "unknown option 'cuont' of mmdiff evaluate; did you mean 'count'"),
        ({"options": {"count": 0}}, "options.count=0"),
        ({"options": {"solver": "euler"}}, "options.solver='euler' is not one of"),
        ({"options": {"steps": 0}}, "steps=0 must be at least 1"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_sweep(**changes)


def test_a_change_is_made_to_every_arm_and_a_complaint_names_the_arm():
    deeper = tiny_sweep().changed(lambda cfg: dataclasses.replace(cfg, name="x"))
    assert [cfg.name for cfg in deeper.arms.values()] == ["x", "x"] and list(deeper.arms) == ["one", "two"]

    def refuse(cfg: Config) -> Config:
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, key_width=4 + cfg.model.depth * 2))

    with pytest.raises(ConfigError, match=r"^arm 'one': model\.key_width=6"):
        tiny_sweep().changed(refuse)
    assert tiny_sweep().chosen(["two", "one"]) == ["one", "two"]
    with pytest.raises(ConfigError, match="unknown arm 'tow'; did you mean 'two'"):
        tiny_sweep().chosen(["tow"])


def test_the_example_is_a_sweep_of_about_equal_arms():
    sweep = load_sweep("experiments/ablations/block.py")
    assert sweep.baseline == "gau" and isinstance(sweep, Sweep)
    assert {cfg.model.block for cfg in sweep.arms.values()} == {"attention", "gau"}


GOOD = """
from mmdiff.sweeps.sweep import Sweep
from mmdiff.config import Config, Data
def sweep():
    return Sweep(question="?", arms={"a": Config(data=Data(source="shapes"))}, metrics=(METRIC,))
"""
ALWAYS = ("--budget", "5steps-per-arm", "--workdir", "W")
MISTAKES = [
    (GOOD, (), 2, "give --workdir"),
    (GOOD, ("--workdir", "W"), 2, "give --budget"),
    (GOOD, ("--workdir", "W", "--budget", "5"), 2, "is no budget"),
    (GOOD, (*ALWAYS, "--jobs", "0"), 2, "--jobs '0'"),
    (GOOD, (*ALWAYS, "--modle.width", "3"), 2, "did you mean 'model.width'"),
    (GOOD, (*ALWAYS, "--training.steps=3"), 2, "training.steps is set by the sweep"),
    (GOOD, (*ALWAYS, "--training.checkpoint-every", "3"), 2, "training.checkpoint_every is set by the sweep"),
    (GOOD, (*ALWAYS, "--model.width", "wide"), 2, "wide"),
    (GOOD, (*ALWAYS, "--model.width", "3"), 65, "arm 'a': model.width=3 cannot hold"),
    (GOOD, (*ALWAYS, "--arms", "b"), 65, "unknown arm 'b'; choose from a."),
    (GOOD.replace("METRIC", '"x_eror"'), ALWAYS, 65, "metrics: unknown metric 'x_eror'; did you mean 'x_error'"),
    (GOOD.replace("METRIC", '"phrase_accuracy"'), ALWAYS, 65, "phrases"),
    ("def config(): pass", ALWAYS, 65, "has no function `sweep() -> Sweep`"),
    ("def sweep(): return 3", ALWAYS, 65, "sweep() returned int, not mmdiff.sweeps.sweep.Sweep"),
    (None, ALWAYS, 65, "no sweep file"),
]


@pytest.mark.parametrize(("text", "arguments", "code", "message"), MISTAKES, ids=[m[3] for m in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, text, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "s.py").write_text(text.replace("METRIC", '"x_error"'))
    assert main(["sweep", "s.py", *arguments]) == code
    said = capsys.readouterr().err
    assert message in said and said.startswith("mmdiff sweep: ") and said.count("\n") == 1
    assert not (tmp_path / "W").exists()


def test_help_has_examples(capsys):
    for command in ("sweep", "report"):
        assert main([command, "--help"]) == 0
        assert f"mmdiff {command} " in capsys.readouterr().out.split("examples:")[1]
