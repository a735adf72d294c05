"""A user's mistake is one line on stderr and status 2, and its traceback is shown when asked for."""

import runpy
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from training.command_line import run


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


STAGES = {
    "toyworld.smolvlm": ["--drivelm_json", "NOWHERE", "--vision", "NOWHERE"],
    "align": ["--checkpoint", "NOWHERE", "--data", "NOWHERE", "--feature_cache", "NOWHERE"],
    "assemble": ["--vision", "NOWHERE", "--text", "NOWHERE"],
    "transfer": ["--student", "NOWHERE", "--teacher", "NOWHERE", "--data", "NOWHERE"],
    "finetune": ["--checkpoint", "NOWHERE", "--data", "NOWHERE", "--bf16", "false"],
    "merge": ["--checkpoint", "NOWHERE", "--adapter", "NOWHERE"],
    "overfit": ["--drivelm_json", "NOWHERE", "--image_root", "NOWHERE"],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("extra", [[], ["--unknown", "1"]], ids=["missing folder", "unknown option"])
def test_learning_stages_tell_a_mistake_in_one_line(stage, extra, tmp_path, monkeypatch, capsys):
    words = [word.replace("NOWHERE", str(tmp_path / "nowhere")) for word in STAGES[stage]]
    monkeypatch.setattr(sys, "argv", [stage, *words, "--output_dir", str(tmp_path / "out"), *extra])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delitem(sys.modules, f"training.{stage}", raising=False)  # or runpy warns that it is there already
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"training.{stage}", run_name="__main__")
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and ("--unknown" if extra else "nowhere") in told
    assert told.startswith("error: ") and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()
