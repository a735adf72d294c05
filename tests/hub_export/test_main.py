"""The command line: every command explains itself, and a user's mistake is one line and exit status 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub_export.__main__ import COMMANDS, main, parser_of
from hub_export.engines.vllm import VllmArguments

ROOT = Path(__file__).resolve().parents[2]
# A call of each command that names what is not there.
MISTAKES = {
    "build": "--checkpoint MISSING --out OUT --only_installed",
    "embed": "--checkpoint MISSING --blind MISSING --out OUT",
    "check": "MISSING --only_installed",
    "push": "MISSING anna/smoldriver --dry_run",
    "serve transformers": "MISSING",
    "serve vllm": "MISSING --python MISSING",
    "onnx": "MISSING --out OUT",
    "label": "MISSING MISSING --out OUT",
    "cost": "MISSING --out OUT",
}


def words(command: str, tmp_path: Path) -> list[str]:
    text = f"{command} {MISTAKES[command]}"
    return text.replace("MISSING", str(tmp_path / "missing")).replace("OUT", str(tmp_path / "out")).split()


def mistake(argv, capfd) -> str:
    """What a mistake says on stderr: one line."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    told = capfd.readouterr().err
    assert (stopped.value.code, told.count("\n")) == (2, 1), told
    return told


def test_every_command_is_here():
    assert set(MISTAKES) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and "--traceback" in told
    assert all(option in told for option in re.findall("--[a-z_]+", MISTAKES[command]))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line(command, tmp_path, capfd):
    assert "--no_such_option" in mistake([*words(command, tmp_path), "--no_such_option"], capfd)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_one_line(command, tmp_path, capfd):
    assert str(tmp_path / "missing") in mistake(words(command, tmp_path), capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, told", [([], "COMMAND"), (["bild"], "'bild'"), (["serve", "tgi", "x"], "'tgi'")])
def test_an_unknown_command_is_one_line(argv, told, capfd):
    assert told in mistake(argv, capfd)


@pytest.mark.parametrize("content", ["no JSON", "[1]", "{}"])
def test_a_wrong_file_is_one_line_that_names_it(content, tmp_path, capfd):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text(content)
    told = mistake(
        ["build", "--checkpoint", str(tmp_path / "final"), "--out", str(tmp_path / "out")]
        + ["--run", str(tmp_path / "run.json")],
        capfd,
    )
    assert "run.json" in told


def test_the_traceback_is_there_for_who_asks(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="was not written by build"):
        main(["check", str(tmp_path), "--traceback"])
    monkeypatch.setenv("SMOLDRIVER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="was not written by build"):
        main(["check", str(tmp_path)])


def test_a_budget_is_a_number_of_queries():
    for option in ("--num_queries", "--num-queries", "--budget"):
        argv = ["serve", "vllm", "folder", option, "4"]
        given = parser_of(argv).parse_args(argv)
        assert (given.arguments, given.folder, given.num_queries) == (VllmArguments, "folder", 4)


def test_the_module_is_the_command():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hub_export", "check", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "was not written by build" in done.stderr and "Traceback" not in done.stderr
