"""A user's mistake is one line on stderr and status 2, and its traceback is shown when asked for."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from training.stages.command_line import run


@dataclass
class Arguments:
    folder: str = field()
    size: Literal["small", "large"] = "small"


def fail(args: Arguments) -> None:
    raise ValueError(f"no folder\n  {args.folder}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--folder", "x"], "error: no folder x\n"),
        (["--folder", "x", "--unknown", "1"], "--unknown"),
        ([], "required: --folder"),
        (["--folder", "x", "--size", "medium"], "invalid choice: 'medium'"),
    ],
)
def test_a_mistake_is_one_line(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    with pytest.raises(SystemExit) as stopped:
        run(fail, Arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and says in told and told.count("\n") == 1 and "Traceback" not in told


def test_its_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", "--folder", "x", "--traceback"])
    with pytest.raises(ValueError, match="no folder"):
        run(fail, Arguments)
    monkeypatch.setattr(sys, "argv", ["stage", "--folder", "x"])
    monkeypatch.setenv("SMOLDRIVER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no folder"):
        run(fail, Arguments)
