"""The recorder of faults records what passed, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
SAYS = "fault_row.about('stage-full'); fault_row.ended('ABORTED', recover_s=1.234, requests=7, failed=0)"


def recorded(folder: Path, *tests: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what the file holds after these bodies of tests ran."""
    (folder / "conftest.py").write_text((REPO / "tests" / "conftest.py").read_text())
    body = "\n".join(f"def test_{n}(fault_row):\n    {text}\n" for n, text in enumerate(tests))
    (folder / "test_it.py").write_text(body)
    file = folder / "faults.json"
    options = ["-p", "no:cacheprovider", "--rootdir", str(folder), "-c", "/dev/null", "--record-faults", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(file.read_text())["tests"] if file.exists() else {}


def test_a_row_holds_what_the_test_saw(tmp_path: Path) -> None:
    code, rows = recorded(tmp_path, SAYS)
    assert code == 0
    (row,) = rows.values()
    assert row.pop("recorded_at")
    assert row == {"fault": "stage-full", "outcome": "ABORTED", "recover_s": 1.23, "requests": 7, "failed": 0}


def test_a_test_that_fails_takes_its_row_away_and_leaves_the_others(tmp_path: Path) -> None:
    assert len(recorded(tmp_path, SAYS, SAYS)[1]) == 2
    code, rows = recorded(tmp_path, SAYS, f"{SAYS}; assert False")
    assert code == 1
    assert [name.rpartition("::")[2] for name in rows] == ["test_0"]


def test_a_row_cannot_be_forgotten_nor_come_without_a_promise(tmp_path: Path) -> None:
    for body in ("pass", "fault_row.about('unheard-of')", "fault_row.ended('fine')"):
        code, rows = recorded(tmp_path, body)
        assert (code, rows) == (1, {}), body
