"""Every command of `training`: its help, and a mistake told in one line on stderr with exit status 2.

The commands run in this process, as `python -m` would run them: a process of its own takes seconds to import.
"""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import write_prepared

ROOT = Path(__file__).resolve().parents[2]
# A call of each command that names what is not there (MISSING), or has a value that cannot be; OUT is a new folder.
MISTAKES = {
    "align": "--checkpoint MISSING --data MISSING --feature_cache OUT/cache --output_dir OUT",
    "assemble": "--vision MISSING --text MISSING --output_dir OUT",
    "checkpoints.offline_parts": "--cache_dir OUT --only MISSING",
    "evaluate": "--checkpoint MISSING --data MISSING --output_dir OUT",
    "finetune": "--checkpoint MISSING --data MISSING --output_dir OUT --use_cpu true --bf16 false",
    "memory": "--recipe MISSING",
    "merge": "--checkpoint MISSING --adapter MISSING --output_dir OUT",
    "metrics": "--references MISSING --predictions MISSING",
    "nuscenes": "--dataroot MISSING --version v1.0-mini --output_dir OUT",
    "overfit": "--drivelm_json MISSING --image_root MISSING --output_dir OUT",
    "prepare": "--drivelm_json MISSING --image_root MISSING --output_dir OUT",
    "read": "--checkpoint MISSING --output_dir OUT --max_steps 1 --use_cpu true --bf16 false",
    "report": "--runs MISSING --output OUT/report.html",
    "run": "--recipe MISSING",
    "toyworld": "--scenes 1 --output_dir OUT --weathers MISSING",
    "toyworld.smolvlm": "--drivelm_json MISSING --vision MISSING --output_dir OUT",
    "transfer": "--student MISSING --teacher MISSING --data MISSING --output_dir OUT --use_cpu true --bf16 false",
}


def commands() -> dict[str, Path]:
    """The modules of `training` that do something when they are run, without the package's name: {name: file}."""
    found = {}
    for path in (ROOT / "training").rglob("*.py"):
        tests = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if "__name__ == '__main__'" in tests:
            name = ".".join(path.relative_to(ROOT / "training").with_suffix("").parts).removesuffix(".__main__")
            found[name] = path
    return found


CONVERTED = sorted(name for name, path in commands().items() if "command_line" in path.read_text())


def run_command(command: str, words: list[str], monkeypatch) -> int:
    """Run `python -m training.COMMAND WORDS`; its exit status."""
    monkeypatch.setattr(sys, "argv", [command, *words])
    monkeypatch.delenv("SMOLDRIVER_TRACEBACK", raising=False)
    try:
        runpy.run_module(f"training.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def mistake(command: str, tmp_path: Path) -> list[str]:
    words = MISTAKES[command].split()
    return [
        re.sub("^OUT", str(tmp_path / "out"), word).replace("MISSING", str(tmp_path / "missing")) for word in words
    ]


def test_every_command_is_here():
    assert set(commands()) == set(MISTAKES)


def test_every_command_tells_a_mistake_the_same_way():
    assert set(MISTAKES) == set(CONVERTED)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", MISTAKES)
def test_help_lists_the_options(command, monkeypatch, capsys):
    assert run_command(command, ["--help"], monkeypatch) == 0
    told = capsys.readouterr().out
    for option in re.findall("--[a-z_]+", MISTAKES[command]):
        assert option in told


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", CONVERTED)
def test_an_unknown_option_is_one_line(command, monkeypatch, capfd, tmp_path):
    status = run_command(command, [*mistake(command, tmp_path), "--no_such_option", "1"], monkeypatch)
    told = capfd.readouterr().err
    assert (status, told.count("\n")) == (2, 1) and "--no_such_option" in told, told
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", CONVERTED)
def test_what_is_missing_is_one_line(command, monkeypatch, capfd, tmp_path):
    status = run_command(command, mistake(command, tmp_path), monkeypatch)
    told = capfd.readouterr().err
    assert (status, told.count("\n")) == (2, 1) and "missing" in told, told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "words",
    [
        "training.finetune --checkpoint lost/model --data DATA --output_dir lost/run --use_cpu true --bf16 false",
        "hub_export label lost/model DATA --split train --out lost/labels",
    ],
)
def test_a_process_tells_one_line_and_leaves_nothing(words, tmp_path):
    """Libraries that speak while they are imported, and the Hub that would be asked for a path, are seen only here."""
    data = write_prepared(tmp_path / "data")
    (tmp_path / "lost").mkdir()
    words = words.replace("DATA", str(data)).split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert "lost/model is not a folder" in told.stderr
    assert not list((tmp_path / "lost").iterdir())
