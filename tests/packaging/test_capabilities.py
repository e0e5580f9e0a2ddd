"""The record of what works on which vLLM says what happened, failures first."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no engine")

@pytest.fixture
def breaks_later():
    yield
    raise OSError("it did not end")

@pytest.mark.capability("one")
def test_passes(): pass

@pytest.mark.capability("one")
@pytest.mark.capability("two")
def test_fails(): raise ValueError("why\\nand more")

@pytest.mark.capability("three")
def test_skips(): pytest.skip("not here")

@pytest.mark.capability("three")
def test_has_no_fixture(broken): pass

@pytest.mark.capability("four")
def test_ends_badly(breaks_later): pass

def test_of_nothing(): pass
"""


def record(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the plugin wrote of the tests in `folder`: name to (capabilities, outcome, reason)."""
    (folder / "test_it.py").write_text(TESTS)
    file = folder / "new" / "record.json"
    run = [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml", "-p", "tests.capabilities"]
    options = ["--capabilities", str(file), "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    subprocess.run([*run, *options, str(folder)], cwd=REPO, timeout=120, check=False, capture_output=True)
    written = json.loads(file.read_text())
    assert written["python"]
    return {name.partition("::")[2]: tuple(test.values()) for name, test in written["tests"].items()}


def test_each_marked_test_is_recorded_with_its_outcome_and_the_reason(tmp_path: Path) -> None:
    assert record(tmp_path) == {
        "test_passes": (["one"], "passed", ""),
        "test_fails": (["one", "two"], "failed", "ValueError: why"),
        "test_skips": (["three"], "skipped", "not here"),
        "test_has_no_fixture": (["three"], "failed", "OSError: no engine"),
        "test_ends_badly": (["four"], "failed", "OSError: it did not end"),
    }


def test_a_run_of_some_tests_replaces_the_record_unless_told_to_add(tmp_path: Path) -> None:
    record(tmp_path)
    assert len(record(tmp_path, "-k", "passes", "--capabilities-add")) == 5
    assert len(record(tmp_path, "-k", "passes")) == 1
