"""Fleets that several tests begin with."""

from tests.coordinator.rules.bench import Bench

from hotweights.coordinator.rules.state import Limits


def fleet(count: int = 3, *, limits: Limits | None = None) -> Bench:
    """Replicas r0, r1, ... on nodes n0, n1, ..., all of which serve v1; v2 is published on n0."""
    bench = Bench(limits)
    for i in range(count):
        bench.agent(f"n{i}", "d1", *(["d2"] if i == 0 else []))
    bench.publish("v1", "d1")
    for i in range(count):
        bench.replica(f"r{i}", f"n{i}", "d1")
    bench.publish("v2", "d2")
    return bench


def committed_fleet(count: int = 3, *, limits: Limits | None = None) -> Bench:
    """The same, committed to v1."""
    bench = fleet(count, limits=limits)
    bench.start("v1")
    bench.obey()
    assert bench.committed == "v1"
    bench.notes.clear()
    bench.told.clear()
    bench.orders.clear()
    return bench
