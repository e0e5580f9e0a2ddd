"""Writes down what became of a fault, for docs/RELIABILITY.md.

A test anywhere under tests/ asks for the fixture and says what it saw, once, at its end:

    def test_an_agent_killed_at_a_bucket_goes_on(fleet: Fleet, fault_row: FaultRow) -> None:
        fault_row.about("agent-killed-staging")  # a key of tests/fault_promises.py, where its promise stands
        ...
        fault_row.ended("COMMITTED", recover_s=2.1, requests=40, failed=0)

`recover_s` is the time from the fault until what was promised is true again; requests are those that clients sent from
the fault on, `failed` those that got no whole answer. Leave out what was not measured.

Nothing is written unless pytest is given `--record-faults=FILE.json`; then rows of tests that passed are merged into
the file: a test that runs again takes its own row's place, one that fails takes it away. `make faults` records all of
them and makes the table anew (benchmarks/reliability.py). A test that asked for the fixture and passed without `about`
and `ended` fails: a row is never left out by oversight.
"""

import json
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from benchmarks.report import machine
from tests.fault_promises import BY_KEY

_OPTION = "--record-faults"
_PASSED = pytest.StashKey[bool]()


class FaultRow:
    """One test's part of a row."""

    def __init__(self) -> None:
        self.key = ""
        self.seen: dict[str, Any] | None = None

    def about(self, key: str) -> None:
        """Names the row; before the fault is injected."""
        if key not in BY_KEY:
            raise KeyError(f"{key!r} has no promise in tests/fault_promises.py")
        self.key = key

    def ended(
        self,
        outcome: str,
        *,
        recover_s: float | None = None,
        requests: int | None = None,
        failed: int | None = None,
    ) -> None:
        """What was seen, in a few words. Call it after the assertions."""
        if not self.key:
            raise RuntimeError("call `about` first: the promise comes before the outcome")
        self.seen = {
            "outcome": outcome,
            "recover_s": None if recover_s is None else round(recover_s, 2),
            "requests": requests,
            "failed": failed,
        }


class Recording:
    """The file of one machine's rows; read and written whole, a row at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, test: str, row: dict[str, Any] | None) -> None:
        """A test's row; None takes it away."""
        recorded = json.loads(self._path.read_text()) if self._path.exists() else {"tests": {}}
        recorded["tests"].pop(test, None)
        if row is not None:
            recorded["tests"][test] = row
        recorded["tests"] = dict(sorted(recorded["tests"].items()))
        recorded["machine"] = machine()
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(recorded, indent=1) + "\n")
        fresh.replace(self._path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        _OPTION, type=Path, metavar="FILE", help="write what became of injected faults into this JSON file"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With the option, only what records is run."""
    if config.getoption(_OPTION) is not None:
        others = [item for item in items if "fault_row" not in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Generator[FaultRow, None, None]:
    """See the module's docstring."""
    row = FaultRow()
    yield row
    passed = request.node.stash.get(_PASSED, False)
    if (path := request.config.getoption(_OPTION)) is not None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        kept = {"fault": row.key, "recorded_at": now, **row.seen} if passed and row.seen is not None else None
        Recording(path).put(request.node.nodeid, kept)
    if passed and row.seen is None:
        pytest.fail("the test passed without fault_row.about and fault_row.ended")
