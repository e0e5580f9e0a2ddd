"""The figures in the documents are those of the result files, put there by a script."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_tables.py"


def result(**more: Any) -> str:
    machine = {"cpu": "A CPU", "cores": 2, "memory_gib": 4.0, "gpu": None}
    given = {"benchmark": "b", "date": "2026-01-01T00:00:00+00:00", "machine": machine, "runs": 3, "ratios": {}}
    return json.dumps({**given, "medians": {}, "skipped": {}, **more})


def run(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path


def test_the_newest_result_of_each_benchmark_is_told_with_what_was_not_measured(root: Path) -> None:
    results = root / "benchmarks" / "results"
    (results / "b-2026-01-01-m.json").write_text(result(ratios={"rate": 0.123456}))
    newer = result(date="2026-02-01T00:00:00+00:00", ratios={"rate": 2.5}, skipped={"other_rate": "not here"})
    (results / "b-2026-02-01-m.json").write_text(newer)
    (results / "faults.json").write_text(json.dumps({"tests": {}}))
    assert run(root, "--check").returncode == 1
    assert run(root).returncode == 0
    text = (root / "docs" / "BENCHMARKS.md").read_text()
    assert "| rate | 2.5 |" in text
    assert "0.123" not in text
    assert "| other_rate | not here |" in text
    assert "2026-02-01, A CPU, 2 cores" in text
    assert "<svg" in (root / "docs" / "benchmarks" / "b.svg").read_text()
    assert run(root, "--check").returncode == 0


def test_what_is_out_of_step_is_named_and_what_is_no_more_is_removed(root: Path) -> None:
    results = root / "benchmarks" / "results"
    (results / "b-2026-01-01-m.json").write_text(result(ratios={"rate": 1.0}))
    run(root)
    (root / "docs" / "benchmarks" / "gone.svg").write_text("<svg/>")
    (results / "b-2026-01-01-m.json").write_text(result(ratios={"rate": 3.0}))
    said = run(root, "--check").stderr
    assert "docs/BENCHMARKS.md" in said
    assert "docs/benchmarks/gone.svg" in said
    run(root)
    assert not (root / "docs" / "benchmarks" / "gone.svg").exists()
    assert run(root, "--check").returncode == 0


def test_the_projects_own_tables_are_in_step() -> None:
    assert run(SCRIPT.parents[1], "--check").returncode == 0
