"""docs/RELIABILITY.md says what was recorded and what the code has."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.reliability import HEAD, PAGE, newest, page_with, table
from tests.fault_promises import FAULTS

from hotweights.wire.failpoints import POINTS

REPO = Path(__file__).parents[2]
TEXT = PAGE.read_text()


def test_the_table_of_faults_is_the_one_that_was_recorded() -> None:
    assert page_with(TEXT, newest()) == TEXT, "run `python -m benchmarks.reliability`"


def test_every_promise_has_its_row_also_one_that_was_not_run() -> None:
    made = table({"tests": {}})
    assert made.startswith(HEAD)
    assert [line.split(" | ")[0].removeprefix("| ") for line in made.splitlines()[2:]] == [f.fault for f in FAULTS]
    assert "not run yet" in made


def test_rows_of_one_fault_are_counted_together() -> None:
    row = {"fault": "stage-full", "outcome": "ABORTED", "recover_s": 1.0, "requests": 5, "failed": 0}
    made = table({"tests": {"a": row, "b": {**row, "recover_s": 2.55, "failed": 1}}})
    assert "| ABORTED (2 ways) | 1.0 to 2.5 s | 1 of 10 |" in made


def test_every_failpoint_stands_in_the_page_and_is_printed_by_the_command() -> None:
    rows = re.findall(r"^\| `([a-z]+\.[a-z.]+)` \| (\w+) \| (.*) \| (.*) \|$", TEXT, re.MULTILINE)
    assert rows == [(p.name, p.process, p.where, p.number or "passes") for p in POINTS]
    done = subprocess.run(
        [sys.executable, "-m", "hotweights.cli", "failpoints"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(point.name in done.stdout for point in POINTS)


DEADLINES = re.findall(r"^\| .* \| ([\d.]+) \| `([\w.]+):([\w.]+)` \| .* \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("seconds", "module", "name"), DEADLINES, ids=[name for *_, name in DEADLINES])
def test_a_deadline_of_the_page_is_the_codes_own(seconds: str, module: str, name: str) -> None:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    assert float(seconds) == value


def test_no_deadline_of_the_window_and_the_session_is_left_out() -> None:
    """Those that a person may wait for; polls and pauses between tries are none."""
    files = [*REPO.glob("worker_client/hotweights/worker_client/window/*.py")]
    files.append(REPO / "worker_client/hotweights/worker_client/session.py")
    deadline = re.compile(r"^([A-Z_]+_DEADLINE_S) =", re.MULTILINE)
    named = {(path.stem, name) for path in files for name in deadline.findall(path.read_text())}
    listed = {(module.rpartition(".")[2], name) for _, module, name in DEADLINES}
    same = {("sleep", "CALL_DEADLINE_S"), ("identify", "CALL_DEADLINE_S"), ("sleep", "ASLEEP_DEADLINE_S")}
    assert named - listed <= same | {("thread", "STOP_DEADLINE_S")}
