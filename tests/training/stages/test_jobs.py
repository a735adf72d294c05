"""Jobs in order and side by side; what fails holds up only what needs it."""

from threading import Barrier

import pytest

from training.stages.jobs import side_by_side

NEEDS = {"world": [], "read": ["world"], "align": ["read"], "blind": ["read"], "merge": ["align"]}


def test_one_worker_keeps_the_order():
    done: list[str] = []
    told: list[str] = []
    side_by_side(NEEDS, done.append, after=told.append)
    assert done == told == list(NEEDS)


def test_what_does_not_need_each_other_runs_at_once():
    both = Barrier(2, timeout=20)  # breaks unless two are there

    def work(name):
        if name in ("align", "blind"):
            both.wait()
        done.append(name)

    done: list[str] = []
    side_by_side(NEEDS, work, workers=2)
    assert done[:2] == ["world", "read"] and set(done[2:4]) == {"align", "blind"} and done[4] == "merge"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_holds_up_what_needs_it(workers, capsys):
    def work(name):
        if name == "align":
            raise OSError("the disk is full")
        done.append(name)

    done: list[str] = []
    with pytest.raises(OSError, match="disk is full"):
        side_by_side(NEEDS, work, workers)
    assert done == ["world", "read", "blind"]
    assert capsys.readouterr().out == "== align failed: the disk is full\n"


def test_several_failures_are_all_told():
    def work(name):
        if name in ("align", "blind"):
            raise ValueError(f"{name} is wrong")

    with pytest.raises(ChildProcessError, match="align is wrong; blind is wrong"):
        side_by_side(NEEDS, work)
