"""The plan: measured once, read ever after, and no other sweep goes on in its workdir."""

import dataclasses
import fcntl
import json
import os
import threading

import pytest

from mmdiff.config import Config, ConfigError
from mmdiff.document import DataError
from mmdiff.sweeps import lock
from mmdiff.sweeps.plan import Unmeasured, read_plan
from mmdiff.sweeps.runs import planned_runs
from tests.sweeps.conftest import measured, plan_for, tiny_config, tiny_sweep


def never(name, cfg):
    raise AssertionError("measured again")


def test_a_time_budget_is_measured_once_and_the_plan_stays_as_it_is(tmp_path):
    plan = plan_for(tmp_path, tiny_sweep())
    assert {name: arm.steps for name, arm in plan.arms.items()} == {"one": 20, "two": 10}
    first = (tmp_path / "sweep.json").read_bytes()
    assert plan_for(tmp_path, tiny_sweep(), measure=never) == plan == read_plan(tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == first
    with pytest.raises(AssertionError, match="measured again"):  # the check can fail
        plan_for(tmp_path / "elsewhere", tiny_sweep(), measure=never)


def test_first_seeds_come_first(tmp_path):
    plan = plan_for(tmp_path, tiny_sweep())
    assert [run.name for run in planned_runs(plan, tmp_path)] == ["one seed-0", "two seed-0", "one seed-1"]
    assert [run.name for run in planned_runs(plan, tmp_path, ["one"])] == ["one seed-0", "one seed-1"]
    assert plan.run_config("two").training.steps == 10


def deeper() -> dict[str, Config]:
    return {"one": tiny_config(), "two": tiny_config(depth=3)}


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({"arms": deeper()}, "2s-per-arm", r"started with arm 'two': model\.depth=2, not 3; use another --workdir"),
        ({"question": "What?"}, "2s-per-arm", r"question='Does a second layer help\?', not 'What\?'"),
        ({"seeds": 3}, "2s-per-arm", r"arm 'two': seeds=1, not 3"),
        ({"metrics": ("x_error", "text_bits_per_byte")}, "2s-per-arm", "metrics="),
        ({"arms": {"one": tiny_config()}}, "2s-per-arm", r"arms='one, two', not 'one'"),
        ({}, "3s-per-arm", "budget='2s-per-arm', not '3s-per-arm'"),
    ],
)
def test_another_sweep_is_refused_with_what_differs(tmp_path, changes, budget, message):
    plan_for(tmp_path, tiny_sweep())
    with pytest.raises(ConfigError, match=message):
        plan_for(tmp_path, tiny_sweep(**changes), budget, measure=never)


def test_arms_left_out_are_measured_when_their_turn_comes(tmp_path):
    plan = plan_for(tmp_path, tiny_sweep(), arms=["two"])
    assert not plan.arms["one"].steps and list(plan.arms) == ["one", "two"]
    asked = []
    plan = plan_for(tmp_path, tiny_sweep(), measure=lambda name, cfg: asked.append(name) or measured(name, cfg))
    assert asked == ["one"] and plan.arms["one"].steps == 20


def fails_at(depth):
    def measure(name, cfg):
        if cfg.model.depth == depth:
            raise Unmeasured("data/mine not found")
        return measured(name, cfg)

    return measure


def test_an_arm_that_cannot_be_measured_fails_alone_and_may_be_mended(tmp_path):
    plan = plan_for(tmp_path, tiny_sweep(), measure=fails_at(2))
    assert plan.arms["two"].failed == "data/mine not found" and plan.arms["one"].steps == 20
    mended = plan_for(tmp_path, tiny_sweep(arms=deeper()))
    assert mended.arms["two"].steps == 6 and not mended.arms["two"].failed
    with pytest.raises(ConfigError, match=r"arm 'two': data/mine not found"):
        plan_for(tmp_path / "strict", tiny_sweep(), measure=fails_at(2), strict=True)


def test_nothing_is_written_when_no_arm_can_be_trained(tmp_path):
    sweep = dataclasses.replace(tiny_sweep(), arms={"one": tiny_config()})
    with pytest.raises(ConfigError, match=r"no arm can be trained; 'one': data/mine not found"):
        plan_for(tmp_path, sweep, measure=fails_at(1))
    assert not (tmp_path / "sweep.json").exists()


def test_changed_code_is_told_and_kept(tmp_path):
    plan_for(tmp_path, tiny_sweep())
    said = []
    plan = plan_for(tmp_path, tiny_sweep(), code={"version": "1", "fingerprint": "g"}, say=said.append)
    assert len(plan.code) == 2 and "the code has changed" in said[0]
    assert len(plan_for(tmp_path, tiny_sweep()).code) == 2


def test_a_damaged_plan_is_one_line(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"arms": {"a": {"stpes": 3}}}))
    with pytest.raises(DataError, match=r"sweep\.json is not the plan of a sweep"):
        read_plan(tmp_path)


def test_one_sweep_at_a_time(tmp_path):
    with lock.Lock(tmp_path) as held, pytest.raises(ConfigError, match=f"in use by another sweep, process {os.getpid()}"):
        assert held.descriptor >= 0
        lock.Lock(tmp_path).__enter__()
    with lock.Lock(tmp_path):  # free again
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written: File exists; use another --workdir"):
        lock.Lock(tmp_path / "file").__enter__()


def test_the_lock_of_a_dead_sweep_is_ignored_but_its_run_is_waited_for(tmp_path):
    (tmp_path / "lock").write_text("999999999\n")
    with lock.Lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    orphan = os.open(tmp_path / "lock", os.O_RDWR)  # as a run would have inherited it
    fcntl.flock(orphan, fcntl.LOCK_EX)
    (tmp_path / "lock").write_text("999999999\n")
    said = []
    threading.Timer(0.3, os.close, [orphan]).start()
    with lock.Lock(tmp_path, said.append, pause=0.05):
        assert said == [f"waiting for a run that an earlier sweep left behind in {tmp_path}"]
