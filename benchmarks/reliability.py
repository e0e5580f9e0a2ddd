"""Makes the table of docs/RELIABILITY.md from what the tests of faults recorded.

usage: python -m benchmarks.reliability [--check] [FILE.json]    (default: the newest benchmarks/results/faults-*.json)

The promises are those of tests/fault_promises.py, the rest is what was seen. `--check` writes nothing and fails when
the page says something else.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fault_promises import FAULTS

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "RELIABILITY.md"
BEGINS, ENDS = "<!-- the table: make faults -->\n", "<!-- end of the table -->\n"
HEAD = "| fault | promised | seen | well again after | requests failed |\n|---|---|---|---|---|\n"


def newest() -> Path:
    """By the date in the name."""
    return max((REPO / "benchmarks" / "results").glob("faults-*.json"))


def table(recorded: dict[str, Any]) -> str:
    """One row a fault, in the order of the promises."""
    rows = []
    for fault in FAULTS:
        seen = [row for row in recorded["tests"].values() if row["fault"] == fault.key]
        rows.append(f"| {fault.fault} | {fault.promise} | {_seen(seen)} |\n")
    return HEAD + "".join(rows)


def _seen(rows: Sequence[dict[str, Any]]) -> str:
    """The last three cells."""
    if not rows:
        return "not run yet | |"
    outcomes = dict.fromkeys(row["outcome"] for row in rows)
    ways = f" ({len(rows)} ways)" if len(rows) > 1 else ""
    times = sorted(row["recover_s"] for row in rows if row["recover_s"] is not None)
    counted = [row for row in rows if row["requests"] is not None]
    failed, requests = sum(row["failed"] for row in counted), sum(row["requests"] for row in counted)
    return f"{'; '.join(outcomes)}{ways} | {_span(times)} | {f'{failed} of {requests}' if counted else ''}"


def _span(times: Sequence[float]) -> str:
    if not times:
        return ""
    low, high = f"{times[0]:.1f}", f"{times[-1]:.1f}"
    return f"{low} s" if low == high else f"{low} to {high} s"


def page_with(text: str, file: Path) -> str:
    """The page with its table made anew. Raises ValueError when it has no place for one."""
    before, found, rest = text.partition(BEGINS)
    _, found_end, after = rest.partition(ENDS)
    if not (found and found_end):
        raise ValueError(f"{PAGE.name} has no lines {BEGINS.strip()!r} and {ENDS.strip()!r}")
    recorded = json.loads(file.read_text())
    machine = recorded["machine"]
    where = f"Seen on {machine['cpu']}, {machine['cores']} cores, CPU build of vLLM; `{file.relative_to(REPO)}`.\n\n"
    return f"{before}{BEGINS}{where}{table(recorded)}{ENDS}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    file = (arguments.file or newest()).resolve()
    before = PAGE.read_text()
    after = page_with(before, file)
    if arguments.check:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
