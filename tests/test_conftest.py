"""A skip that the list does not name fails CI, and every pattern of the list still names a test."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest_plugins = ["pytester"]
TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.parametrize("number", [1, 2])
def test_listed(number): pytest.skip("no Java")

def test_forgotten(): pytest.skip("no time")

@pytest.mark.xfail
def test_expected_to_fail(): assert False
"""
MODULE = """
import pytest
pytest.importorskip("no_such_package")
def test_nothing(): pass
"""


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest((HERE / "conftest.py").read_text())
    pytester.path.joinpath("allowed_skips.txt").write_text("# why\ntest_one.py::test_listed*  needs Java\n")
    return pytester


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_skip_that_is_not_listed_fails_ci(project, options):
    project.makepyfile(test_one=TESTS, test_two=MODULE)
    result = project.runpytest_inprocess("-p", "no:cacheprovider", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    told = [line for line in result.outlines if "does not allow" in line]
    assert len(told) == 2
    assert any("test_one.py::test_forgotten: Skipped: no time" in line for line in told)
    assert any("test_two.py: Skipped: could not import 'no_such_package'" in line for line in told)


def test_a_listed_skip_passes(project):
    project.makepyfile(test_one=TESTS.replace('def test_forgotten(): pytest.skip("no time")', ""))
    assert project.runpytest_inprocess("-p", "no:cacheprovider").ret == 0


def test_only_ci_counts(project, monkeypatch):
    monkeypatch.delenv("CI")
    project.makepyfile(test_one=TESTS)
    assert project.runpytest_inprocess("-p", "no:cacheprovider").ret == 0


def test_the_list_names_tests_that_exist():
    lines = [line for line in (HERE / "allowed_skips.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        pattern, _, reason = line.partition("  ")
        file, _, test = pattern.partition("::")
        assert reason.strip(), f"{pattern} has no reason"
        files = [path for path in HERE.rglob("*.py") if fnmatchcase(f"tests/{path.relative_to(HERE)}", file)]
        assert files, f"no file {file}"
        name = test.rstrip("*")
        assert any(f"def {name}" in path.read_text() for path in files), f"no test {name} in {file}"
