"""By which routes a replica is written: said when it has prepared, shown until it says otherwise or ends."""

from tests.coordinator.rules.bench import Bench
from tests.coordinator.rules.fleets import committed_fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Kind
from hotweights.coordinator.rules.state import Routes

ROUTES = Routes(direct_modules=2, direct_bytes=20, reload_modules=1, reload_bytes=10, reasons=("experts: repacked",))


def prepared(routes: Routes | None = ROUTES) -> Bench:
    bench = committed_fleet(1)
    bench.start("v2")
    bench.stage_all()
    order, _ = bench.take(o.Prepare, "r0")
    bench.do(e.Prepared(*bench.who("r0"), order.update, order.ticket, "d1", routes))
    return bench


def test_they_are_kept_when_the_preparation_counts() -> None:
    assert prepared().state.seats["r0"].routes == ROUTES
    assert prepared(None).state.seats["r0"].routes is None


def test_a_preparation_that_says_none_leaves_those_of_before() -> None:
    bench = prepared()
    bench.obey()
    bench.start("", Kind.ROLLBACK)
    bench.obey()
    assert bench.active["r0"] == "d1"
    assert bench.state.seats["r0"].routes == ROUTES


def test_a_stale_report_changes_none() -> None:
    bench = prepared()
    go, _ = bench.waiting(o.Apply, "r0")[0]
    bench.do(e.Prepared(*bench.who("r0"), go.update, go.ticket, "d1", Routes()))
    assert bench.state.seats["r0"].routes == ROUTES


def test_they_go_with_the_process() -> None:
    bench = prepared()
    bench.leaves("r0")
    bench.replica("r0", "n0", "d1")
    assert bench.state.seats["r0"].routes == ROUTES
    bench.leaves("r0")
    bench.replica("r0", "n0", "d1", new_life=True)
    assert bench.state.seats["r0"].routes is None
