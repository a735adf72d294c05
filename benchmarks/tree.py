"""The README's tree of files, from the files themselves: a module's line is its docstring's first."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("smoldriver_hf", "training", "hub_export", "benchmarks")
ROOT_FILES = (
    "README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE CITATION.cff Makefile setup.cfg pyproject.toml"
)
TESTS = "mirror the packages, but for modules that test_layout.py lists; it keeps the import law, too"
WIDTH = 117


def tree() -> str:
    """The packages' modules and recipes; of a room inside a package its files' names, without their lines."""
    lines = [ROOT_FILES]
    for package in PACKAGES:
        folder = ROOT / package
        lines.append(entry(f"{package}/", first_line(folder / "__init__.py"), 22))
        for file in modules(folder):
            lines.append(entry(f"  {file.name}", first_line(file), 34))
        for room in sorted(path.parent for path in folder.glob("*/__init__.py")):
            lines.append(entry(f"  {room.name}/", first_line(room / "__init__.py"), 34))
            names = " ".join(file.name for file in modules(room))
            lines += textwrap.wrap(names, WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines += [entry(f"  {file.relative_to(folder)}", first_comment(file), 34) for file in recipes(folder)]
    lines.append(entry("tests/", TESTS, 22))
    return "\n".join(lines)


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def recipes(package: Path) -> list[Path]:
    return sorted((package / "recipes").rglob("*.yaml")) if (package / "recipes").is_dir() else []


def entry(name: str, says: str, column: int) -> str:
    """A file and what it says of itself, cut where the line ends."""
    line = f"{name.ljust(column - 1)} # {says}"
    return line if len(line) <= WIDTH else line[: WIDTH - 2].rsplit(" ", 1)[0] + " …"


def first_line(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text()))
    if not text:
        raise ValueError(f"{module.relative_to(ROOT)} has no docstring: the README's tree tells what a file is for")
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def first_comment(recipe: Path) -> str:
    lines = []
    for line in recipe.read_text().splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).removesuffix(".")
