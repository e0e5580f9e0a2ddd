"""Records what was seen of each architecture on a live engine, for the table in docs/VLLM_INTEGRATION.md.

python -m pytest -m matrix tests/adapters/test_architectures.py --record-architectures docs/architectures.json
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROUTES = ("direct", "assembled", "reload")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotweights")
    group.addoption(
        "--record-architectures", type=Path, metavar="FILE", help="write what each architecture did to FILE"
    )


class Recorded:
    """Of one test."""

    def __init__(self) -> None:
        self.key = ""
        self.row: dict[str, Any] = {}

    def begin(self, how: str, architecture: str, ranks: int) -> None:
        """What it is about; a test that ends before `ended` has failed. `how`: an "engine", or the "class" alone."""
        self.key = f"{architecture}/{ranks}/{how}"

    def ended(self, of_ranks: Sequence[dict[str, Any]], parts: Sequence[str] = ()) -> None:
        """All of it was as it must be: by which routes, and which partial versions were tried."""
        counts = {route: [sum(rank[route][at] for rank in of_ranks) for at in (0, 1)] for route in ROUTES}
        reasons = list(dict.fromkeys(reason for rank in of_ranks for reason in rank["reasons"]))
        self.row = {"routes": counts, "reasons": reasons, "parts": list(parts)}


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    """Written down when the test has ended."""
    record = Recorded()
    yield record
    file: Path | None = request.config.getoption("--record-architectures")
    if file is None or not record.key:
        return
    rows = json.loads(file.read_text()) if file.exists() else {}
    rows[record.key] = record.row or {"failed": True}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
    file.write_text(f"{{\n{lines}\n}}\n")
