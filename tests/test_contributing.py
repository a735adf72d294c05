"""CONTRIBUTING names what exists; versions agree; GitHub's files can be read and run what CI runs."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# A name in backticks that is a file, a folder or a module; NAMES in capitals stand for any.
PATH = re.compile(r"`([\w.]+/[\w./]*|\w+\.(?:md|cff|cfg|toml|py|yaml)|(?:training|hub_export|benchmarks)\.[\w.]+)`")


def test_contributing_names_what_exists():
    named = set(PATH.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    for name in named:
        module = ROOT / name.replace(".", "/")
        is_module = "/" not in name and Path(name).suffix[1:] not in ("md", "cff", "cfg", "toml", "py", "yaml")
        places = [module.with_suffix(".py"), module / "__main__.py"] if is_module else [ROOT / name]
        assert any(place.exists() for place in places), f"CONTRIBUTING.md names {name}, which is not there"


def test_make_targets_that_contributing_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text())) <= targets


def test_one_version_everywhere():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert released and all(released)
    assert released[0].groups() == (citation["version"], str(citation["date-released"]))
    assert settings["metadata"]["version"] == citation["version"]
    assert [found[2] for found in released] == sorted((found[2] for found in released), reverse=True)


def test_the_workflow_calls_what_ci_is():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run"
    assert [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})] == ["3.11"]


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_have_what_github_asks_for(form):
    content = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(content)
    assert len({field["id"] for field in content["body"]}) == len(content["body"])
    assert all(field["attributes"]["label"] for field in content["body"])
