"""The laws of the house: who may import whom, what an exported file may import, and that the README's tree is true."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPORTED = sorted((ROOT / "smoldriver_hf").glob("*_smoldriver.py"))  # as hub_export.build chooses them
# What transformers itself needs is there wherever the model is loaded; PIL and jinja2 come with any image processor.
EXPORTED_MAY_IMPORT = {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
FORBIDDEN = {
    "smoldriver_hf": {"training", "hub_export", "benchmarks"},
    "training": {"hub_export", "benchmarks"},
    "hub_export": {"training", "benchmarks"},
}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_law(package):
    for path in (ROOT / package).rglob("*.py"):
        broken = imported_roots(path) & FORBIDDEN[package]
        assert not broken, f"{path.relative_to(ROOT)} imports {sorted(broken)}; packages meet through files"


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.name)
def test_exported_files_import_only_what_a_hub_user_has(path):
    assert imported_roots(path) <= EXPORTED_MAY_IMPORT
    siblings = {other.stem for other in EXPORTED}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings, "only `from .sibling import X` is followed by the Hub"


def test_readme_tree_is_true():
    """Every file the README's tree names exists, and every module and recipe of the packages is in it."""
    tree = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    named, folder, room = set(), "", ""
    for line in tree.splitlines():
        entry = line.split("#")[0].rstrip()
        if not entry:
            continue
        if not entry.startswith(" "):
            folder, room = entry if entry.endswith("/") else "", ""
            if not folder:
                named.update(entry.split())
        elif entry.endswith("/"):
            room = entry.strip()
        else:
            within = folder + (room if entry.startswith("    ") else "")
            named.update(within + name for name in entry.split())
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"README names what does not exist: {missing}"
    packages = ("smoldriver_hf", "training", "hub_export", "benchmarks")
    there = {
        str(path.relative_to(ROOT))
        for package in packages
        for pattern in ("*.py", "recipes/*.yaml")
        for path in (ROOT / package).rglob(pattern)
        if path.name != "__init__.py" and path.parent.name != "templates"
    }
    assert there <= named, f"not in the README's tree: {sorted(there - named)}"


def test_no_path_of_one_machine_in_the_project():
    needle = re.compile(r"(^|[^A-Za-z0-9_.~}])/(home|root|mnt)/[A-Za-z.]")
    for pattern in ("*.py", "*.md", "*.cfg", "*.toml", "*.yaml"):
        for path in ROOT.rglob(pattern):
            if not {".venv", ".ci-venv", ".git", "outputs"} & set(path.relative_to(ROOT).parts):
                assert not needle.search(path.read_text()), f"{path.relative_to(ROOT)} holds a path of one machine"
