"""CI fails on a test that was skipped and is not in `allowed_skips.txt`: what nobody runs proves nothing."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


def allowed() -> list[str]:
    """The patterns of test ids that may be skipped."""
    return [line.split()[0] for line in ALLOWED.read_text().splitlines() if line.strip() and not line.startswith("#")]


class UnexpectedSkips:
    """Collects skips that no pattern allows, and fails the run at its end."""

    def __init__(self) -> None:
        self.patterns = allowed()
        self.found: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.look_at(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self.look_at(report)

    def look_at(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and not any(fnmatchcase(report.nodeid, pattern) for pattern in self.patterns):
            *_, reason = report.longrepr
            self.found[report.nodeid] = reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test, reason in self.found.items():
            terminalreporter.line(f"SKIPPED, which {ALLOWED.name} does not allow: {test}: {reason}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    # With pytest-xdist the workers' reports arrive at the process that counts.
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(UnexpectedSkips())
