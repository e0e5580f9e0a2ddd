"""What nodes say of their sources: told once, and a liar of whom two say so is nobody's source any longer."""

import pytest
from tests.coordinator.rules.bench import Bench
from tests.coordinator.rules.fleets import committed_fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.orders import NoteKind
from hotweights.coordinator.rules.state import ACCUSERS_MIN


@pytest.fixture
def bench() -> Bench:
    """Three nodes; n1 and n2 are to get d2, which n0 has."""
    bench = committed_fleet()
    bench.start("v2")
    return bench


def left(bench: Bench, node: str, source: str, reason: str = "stalls", *, lied: bool = False) -> None:
    bench.do(e.SourceLeft(bench.now, node, bench.sessions[node], bench.update.id, "d2", source, reason, lied))


def notes(bench: Bench, kind: NoteKind) -> list[str]:
    return [note.message for note in bench.notes if note.kind is kind]


def test_a_source_that_was_left_is_an_event_once(bench: Bench) -> None:
    for _ in range(3):
        left(bench, "n2", "n1")
    left(bench, "n2", "n1", "is gone")
    assert notes(bench, NoteKind.SOURCE_LEFT) == [
        "node n2 left its source n1: stalls",
        "node n2 left its source n1: is gone",
    ]
    assert not bench.state.nodes["n1"].quarantine


def test_one_node_alone_puts_nobody_in_quarantine(bench: Bench) -> None:
    """It may be the one that is broken."""
    for _ in range(5):
        left(bench, "n2", "n1", "sent wrong bytes", lied=True)
    assert not bench.state.nodes["n1"].quarantine
    left(bench, "n1", "n1", "sent wrong bytes", lied=True)  # nor does it itself
    assert not bench.state.nodes["n1"].quarantine


def test_two_nodes_do_until_its_agent_is_started_again(bench: Bench) -> None:
    assert ACCUSERS_MIN == 2
    bench.stage("n1")
    left(bench, "n2", "n1", "sent wrong bytes", lied=True)
    left(bench, "n0", "n1", "sent wrong bytes", lied=True)
    assert bench.state.nodes["n1"].quarantine == "sent wrong bytes to nodes n0, n2"
    assert notes(bench, NoteKind.NODE_QUARANTINED) == [
        "node n1 sent wrong bytes to nodes n0, n2: nobody is told to fetch from it until its agent is started again"
    ]
    bench.agent("n1", "d2")  # the same process, on another stream
    assert bench.state.nodes["n1"].quarantine
    bench.leaves("n1")
    bench.agent("n1", "d2", life=7)
    assert not bench.state.nodes["n1"].quarantine


def test_who_was_not_told_to_fetch_accuses_nobody(bench: Bench) -> None:
    bench.agent("n8")
    bench.agent("n9")
    for node in ("n8", "n9"):
        left(bench, node, "n1", "sent wrong bytes", lied=True)
    bench.do(e.SourceLeft(bench.now, "n2", bench.sessions["n2"], "another", "d2", "n1", "sent wrong bytes", True))
    assert not bench.state.nodes["n1"].accusers


def test_nobody_is_told_to_fetch_from_who_is_in_quarantine(bench: Bench) -> None:
    for _ in range(2):
        bench.stage("n1")
    left(bench, "n2", "n1", "sent wrong bytes", lied=True)
    left(bench, "n0", "n1", "sent wrong bytes", lied=True)
    bench.orders.clear()
    bench.agent("n2")  # asked anew
    sources = {order.member: stage.source_nodes for order, stage in bench.waiting(o.Stage) if stage.digest == "d2"}
    assert sources["n2"] == ("n0",)


def test_progress_says_from_whom_and_how_fast(bench: Bench) -> None:
    session = bench.sessions["n2"]
    bench.do(e.StageProgressed(bench.now, "n2", session, bench.update.id, "d2", 5, 10, "n1", 2.5))
    now = bench.state.efforts[bench.update.id].progress["n2"]
    assert (now.bytes_done, now.bytes_total, now.source, now.bytes_per_s) == (5, 10, "n1", 2.5)
