"""What the packages import is what their extras install, and what CI installs is pinned."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OWN = {"smoldriver_hf", "training", "hub_export", "benchmarks"}
EXTRAS = {
    "smoldriver_hf": (),
    "training": ("train", "nuscenes"),
    "hub_export": ("export", "serve"),
    "benchmarks": ("train", "export"),
}
COME_WITH_TRANSFORMERS = {"filelock", "numpy", "safetensors", "tokenizers", "tqdm"}
# Imported where the user has them; what needs them says so.
OPTIONAL = {"smoldriver_hf": {"onnx", "peft"}, "hub_export": {"gradio", "ray", "vllm"}}
# Required and imported by no file of the packages, and by whom they are used.
USED_BY = {
    "evaluate": "the users' own scripts; a module of the challenge's score for it is still to come",
    "gguf": "transformers, for the language model that comes in a wheel",
    "onnxscript": "torch.onnx.export",
    "openai": "transformers' own server",
    "tensorboard": "transformers' Trainer, for --report_to tensorboard",
    "uvicorn": "transformers' own server",
}


def requirements() -> dict[str, list[Requirement]]:
    """{extra: its requirements}; what is always installed stands under the empty name."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    sections = {"": settings["options"]["install_requires"], **settings["options.extras_require"]}
    return {name: [Requirement(line) for line in text.splitlines() if line.strip()] for name, text in sections.items()}


REQUIREMENTS = requirements()


def names(extra: str) -> set[str]:
    return {canonicalize_name(one.name) for one in REQUIREMENTS[extra]}


def distributions_of(package: str) -> dict[str, str]:
    """{what a package's files import that is not their own: the distribution that brings it}."""
    brings, found = packages_distributions(), {}
    left_out = set(sys.stdlib_module_names) | OWN | OPTIONAL.get(package, set())
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for root in {module.split(".")[0] for module in modules} - left_out:
                found[root] = canonicalize_name(brings.get(root, ["nothing that is installed"])[0])
    return found


@pytest.mark.parametrize("package", EXTRAS)
def test_what_is_imported_is_required(package):
    required = set().union(names(""), COME_WITH_TRANSFORMERS, *map(names, EXTRAS[package]))
    missing = {root: one for root, one in distributions_of(package).items() if one not in required}
    assert not missing, f"{package} imports what no extra of {EXTRAS[package]} installs: {missing}"


def test_what_is_required_is_used():
    imported = set().union(*(distributions_of(package).values() for package in EXTRAS))
    required = set().union(*(names(extra) for extra in ("", "train", "nuscenes", "serve", "export")))
    assert required - imported == set(USED_BY)


def test_the_extra_test_holds_all_of_them():
    (own,) = [one for one in REQUIREMENTS["test"] if one.name == "smoldriver-hf"]
    assert own.extras == set(REQUIREMENTS) - {"", "test"}


def test_ci_pins_every_requirement_within_its_bounds():
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version for name, version in re.findall(r"(?m)^(\S+)==(\S+)$", "\n".join(lines))
    }
    for extra, required in REQUIREMENTS.items():
        for one in required:
            if one.name != "smoldriver-hf":
                version = pinned.get(canonicalize_name(one.name))
                assert version and Version(version) in one.specifier, f"{extra}: {one}, pinned is {version}"
