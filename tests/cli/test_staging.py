"""What a person sees while nodes get an image: from whom, how fast, how long still, and who is in quarantine."""

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from hotweights.cli.output import Table
from hotweights.cli.progress import BARS_MAX, Bar
from hotweights.cli.status import node_table, update_tables
from hotweights.v1 import fleet_pb2, update_pb2


def staging(count: int = 2) -> update_pb2.Update:
    update = update_pb2.Update(id="u1", model="m", target_version="v2", phase=update_pb2.UPDATE_PHASE_STAGING)
    for number in range(count):
        update.nodes.add(
            node_id=f"n{number}",
            bytes_done=50_000_000,
            bytes_total=150_000_000,
            source_node_id="[n]0",
            bytes_per_s=25e6,
        )
    return update


def rows_of(tables: Any, title: str) -> list[dict[str, str]]:
    table: Table = next(table for table in tables if table.title.endswith(title))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_table_says_from_whom_how_fast_and_how_long_still() -> None:
    row = rows_of(update_tables(staging()), "staging")[1]
    assert (row["NODE"], row["FROM"], row["RATE"], row["LEFT"]) == ("n1", "[n]0", "25.0 MB/s", "4 s")


def test_a_node_in_quarantine_says_why() -> None:
    node = fleet_pb2.Node(id="n1", connected=True, quarantine="sent wrong bytes to nodes a, b")
    assert rows_of([node_table([node])], "nodes")[0]["QUARANTINE"] == "sent wrong bytes to nodes a, b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that is written to a text."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    return screen


def test_on_a_terminal_every_node_has_a_bar(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())  # here: pytest sets its own before each test
    update = staging(BARS_MAX + 4)
    with Bar("staging v2", wanted=True) as bar:
        bar.each(update.nodes)
        bar.each(update.nodes)
        update.nodes[0].staged = True
        bar.each(update.nodes)
    shown = screen.getvalue()
    assert "n1 from [n]0" in shown
    assert f"n{BARS_MAX - 1} from" in shown
    assert f"n{BARS_MAX + 1} from" not in shown


def test_without_a_terminal_there_is_none() -> None:
    with Bar("staging v2", wanted=True) as bar:
        bar.each(staging().nodes)
