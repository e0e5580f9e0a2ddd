"""The one JSON object that every benchmark prints as the last line of its standard output.

    {"benchmark": NAME, "date": ISO, "machine": {...}, "runs": N,
     "ratios": {KEY: NUMBER}, "medians": {KEY: {"value": NUMBER, "unit": ...}}, "skipped": {KEY: "reason"}}

What took part in a ratio was measured in the same run, so that noise of the machine meets both: the
ratio is taken run by run, and its median reported.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path


class Report:
    """Collects what a benchmark found."""

    def __init__(self, benchmark: str, runs: int) -> None:
        self.benchmark = benchmark
        self.runs = runs
        self.ratios: dict[str, float] = {}
        self.medians: dict[str, dict[str, float | str]] = {}
        self.skipped: dict[str, str] = {}

    def median(self, key: str, values: Sequence[float], unit: str) -> None:
        """Of one value a run, in `unit`: "s", "GB/s", "bytes", ..."""
        self.medians[key] = {"value": statistics.median(values), "unit": unit}

    def ratio(self, key: str, over: Sequence[float], under: Sequence[float]) -> None:
        """`over` by `under`, run by run."""
        self.ratios[key] = statistics.median(a / b for a, b in zip(over, under, strict=True))

    def skip(self, key: str, reason: str) -> None:
        """For what does not run on this machine: said, never left out."""
        self.skipped[key] = reason

    def emit(self, *, as_json: bool) -> None:
        """Prints it: one line of JSON, or a line a number for a person."""
        if as_json:
            print(json.dumps(self.as_dict()), flush=True)
            return
        for name, ratio in self.ratios.items():
            print(f"{name:32} {ratio:.3f}")
        for name, median in self.medians.items():
            print(f"{name:32} {median['value']:.4g} {median['unit']}")
        for name, reason in self.skipped.items():
            print(f"{name:32} skipped: {reason}")

    def as_dict(self) -> dict[str, object]:
        return {
            "benchmark": self.benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "runs": self.runs,
            "ratios": self.ratios,
            "medians": self.medians,
            "skipped": self.skipped,
        }


def progress(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_bytes / (1 << 30), 1),
        "gpu": _gpu(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().partition("\n")[0] or None
