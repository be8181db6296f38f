"""Every second of a run belongs to one phase, over as many sessions as it takes."""

import json

import pytest

from mmdiff.training.goodput import PHASES, Goodput


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def after(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def session(folder, clock, step=None):
    goodput = Goodput(folder, clock=clock)
    clock.after(2)
    if step is not None:
        goodput.resume(step)
    with goodput.phase("compile"):
        clock.after(10)
    goodput.enter("step")
    return goodput


def test_phases_nest_and_add_up(tmp_path, clock):
    goodput = session(tmp_path, clock)
    clock.after(30)
    with goodput.phase("evaluation"):
        clock.after(5)
        with goodput.phase("checkpoint"):
            clock.after(1)
        clock.after(2)
    with goodput.phase("data"):
        clock.after(4)
    clock.after(6)
    goodput.write()
    want = {"init": 2, "compile": 10, "data": 4, "step": 36, "evaluation": 7, "checkpoint": 1, "lost": 0}
    assert goodput.seconds == want and list(want) == list(PHASES)
    assert goodput.summary() == (
        "goodput 60.0% of 60.0 s: init 2.0 s, compile 10.0 s, data wait 4.0 s, step 36.0 s, evaluation 7.0 s, checkpoint 1.0 s"
    )


def test_what_was_done_after_the_last_checkpoint_is_lost(tmp_path, clock):
    first = session(tmp_path, clock)
    clock.after(20)
    first.saved(100)
    clock.after(7)
    first.write()  # killed after this
    clock.after(1000)  # nobody's
    second = session(tmp_path, clock, step=100)
    clock.after(3)
    second.write()
    assert second.seconds == {"init": 4, "compile": 20, "data": 0, "step": 23, "evaluation": 0, "checkpoint": 0, "lost": 7}


def test_going_back_to_an_older_checkpoint_loses_more(tmp_path, clock):
    first = session(tmp_path, clock)
    clock.after(20)
    first.saved(100)
    clock.after(30)
    first.saved(200)
    second = session(tmp_path, clock, step=100)  # 200 is damaged
    assert second.seconds["step"] == 20 and second.seconds["lost"] == 30
    second.saved(150)
    assert sorted(map(int, json.loads((tmp_path / "goodput.json").read_text())["saves"])) == [100, 150]


def test_a_run_that_never_saved_lost_all_of_it(tmp_path, clock):
    session(tmp_path, clock).write()
    assert session(tmp_path, clock, step=0).seconds["lost"] == 12


def test_only_the_first_process_writes(tmp_path, clock):
    goodput = Goodput(tmp_path, write=False, clock=clock)
    goodput.saved(1)
    assert not list(tmp_path.iterdir())
