"""What the README tells people to type exists, and its Python runs."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from exported import save_checkpoint
from tiny import picture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """The words of every command in the README's shell blocks."""
    lines = [
        line
        for kind, text in BLOCKS
        if kind == "bash"
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [words for line in lines for words in [shlex.split(line, comments=True)] if words]


def module_file(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def names_in(path: Path) -> set[str]:
    """What a module's options can be called: fields of its dataclasses, and strings given to argparse."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value.lstrip("-"))
    return names


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_exists(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets)
    elif words[:2] == ["python", "-m"]:
        path = module_file(words[2])
        assert path.is_file(), f"no module {words[2]}"
        packages = [path] if path.name != "__main__.py" else list(path.parent.glob("*.py"))
        known = set().union(*map(names_in, packages)) | {"help"}
        unknown = [word for word in words if word.startswith("--") and word[2:] not in known]
        assert not unknown, f"{words[2]} has no option {unknown[0]}"
    else:
        assert words[0] in ("pip", "torchrun", "accelerate"), words


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    assert 'checkpoint = "outputs/demo/export"' in code
    code = code.replace("outputs/demo/export", str(save_checkpoint(tmp_path / "export")))
    for name in ("front", "back"):
        picture(len(name)).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
