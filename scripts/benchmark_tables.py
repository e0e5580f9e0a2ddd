"""Makes docs/BENCHMARKS.md and its drawings of what the benchmarks printed: the files in benchmarks/results.

    benchmarks/results/NAME-DATE-MACHINE.json --the newest of each NAME--> docs/BENCHMARKS.md, docs/benchmarks/NAME.svg

With --check writes nothing and fails when they are out of step. What each key means stands in the benchmark's own help:
python -m benchmarks.NAME --help.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Benchmarks

Made by `scripts/benchmark_tables.py` of the files in [benchmarks/results](../benchmarks/results), the newest of each
benchmark. Ratios are medians over runs, both sides taken in the same run; machines are noisy, and ratios travel better
than times. What a key means: `.venv/bin/python -m benchmarks.NAME --help`.
"""
BAR, ROW, LEFT, WIDTH = 16, 26, 210, 760
Result = dict[str, Any]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of docs/ and benchmarks/results/")
    args = parser.parse_args()
    docs = args.root / "docs"
    made = files(newest(args.root / "benchmarks" / "results"))
    stale = [name for name, text in made.items() if not _says(docs / name, text)]
    stale += [f"benchmarks/{path.name}" for path in docs.glob("benchmarks/*") if f"benchmarks/{path.name}" not in made]
    if args.check and stale:
        names = ", ".join(f"docs/{name}" for name in stale)
        print(f"benchmark_tables: {names}: not what the results say; run scripts/benchmark_tables.py", file=sys.stderr)
        return 1
    if not args.check:
        for name in stale:
            (docs / name).parent.mkdir(exist_ok=True)
            if name in made:
                (docs / name).write_text(made[name])
            else:
                (docs / name).unlink()
    return 0


def _says(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def newest(folder: Path) -> list[tuple[str, Result]]:
    """Of each benchmark, with the name of its file; what is not of a benchmark is passed over."""
    found: dict[str, tuple[str, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "benchmark" not in result:
            continue
        name = result["benchmark"]
        if name not in found or found[name][1]["date"] < result["date"]:
            found[name] = path.name, result
    return [found[name] for name in sorted(found)]


def files(results: list[tuple[str, Result]]) -> dict[str, str]:
    """The text of each, by its name below docs/."""
    made = {f"benchmarks/{result['benchmark']}.svg": drawing(result) for _, result in results if result["ratios"]}
    made["BENCHMARKS.md"] = "\n".join([HEAD, *(section(name, result) for name, result in results)])
    return made


def section(file: str, result: Result) -> str:
    name, machine = result["benchmark"], result["machine"]
    gpu = machine["gpu"] or "no GPU"
    lines = [
        f"## {name}",
        "",
        f"{result['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpu}; "
        f"{result['runs']} runs ([{file}](../benchmarks/results/{file})).",
        "",
    ]
    if result["ratios"]:
        lines += [f"![ratios of {name}](benchmarks/{name}.svg)", "", "| ratio | |", "|---|---|"]
        lines += [f"| {key} | {number(value)} |" for key, value in result["ratios"].items()]
        lines += [""]
    if result["medians"]:
        lines += ["| median | | |", "|---|---|---|"]
        lines += [f"| {key} | {number(m['value'])} | {m['unit']} |" for key, m in result["medians"].items()]
        lines += [""]
    if result["skipped"]:
        lines += ["| not measured | why |", "|---|---|"]
        lines += [f"| {key} | {reason} |" for key, reason in result["skipped"].items()]
        lines += [""]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def drawing(result: Result) -> str:
    """A bar for each ratio; the line is at 1, where both sides are alike."""
    ratios = result["ratios"]
    most = max(1.0, *ratios.values()) * 1.05
    scale = (WIDTH - LEFT - 70) / most
    height = ROW * len(ratios) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for at, (key, value) in enumerate(ratios.items()):
        top, length = 10 + at * ROW, max(1.0, value * scale)
        parts += [
            f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end" fill="#222">{key}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="#4a78b5"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 13}" fill="#222">{number(value)}</text>',
        ]
    one = LEFT + scale
    parts += [f'<line x1="{one:.1f}" x2="{one:.1f}" y1="4" y2="{height - 4}" stroke="#b54a4a"/>', "</svg>", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
