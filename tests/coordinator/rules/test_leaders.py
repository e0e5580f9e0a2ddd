"""A new leader at every step: only what was written is left, everybody says Hello, and the update ends as it should."""

from collections.abc import Callable, Iterator

import pytest
from tests.coordinator.rules.bench import WINDOW, Bench
from tests.coordinator.rules.fleets import committed_fleet

from hotweights.coordinator import ledger
from hotweights.coordinator.rules import State
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Decision, Outcome, Phase
from hotweights.coordinator.store import Opened
from hotweights.coordinator.store.codec import decode, encode

STEPS_MAX = 60


def acts(bench: Bench, failing: str) -> Iterator[None]:
    """One act of one member at a time; `failing` fails its first window."""
    failed = False
    while True:
        orders = [order for order in bench.orders if isinstance(order.action, o.Stage | o.Prepare | o.Apply)]
        if not orders:
            return
        order = orders[0]
        match order.action:
            case o.Stage():
                bench.stage(order.member)
            case o.Prepare():
                bench.prepare(order.member)
            case o.Apply() if order.member == failing and not failed:
                failed = True
                bench.fail(failing)
            case _:
                bench.apply(order.member)
        yield


def after_acts(count: int, failing: str = "") -> Bench:
    bench = committed_fleet(3)
    bench.start("v2")
    for _, _ in zip(range(count), acts(bench, failing), strict=False):
        pass
    return bench


def restart_points(failing: str = "") -> list[int]:
    """All counts of acts after which the update is open."""
    return [count for count in range(STEPS_MAX) if after_acts(count, failing).phase().is_open]


@pytest.mark.parametrize("count", restart_points())
def test_an_update_commits_under_a_new_leader(count: int) -> None:
    bench = after_acts(count)
    before = bench.update
    bench.lead_anew()
    bench.obey()
    bench.wait(400)
    bench.obey()
    # Where a GO was out, the new leader cannot know whether it was heard: that replica is taken back.
    in_doubt = any(m.outcome is Outcome.APPLYING for m in before.members.values())
    assert bench.phase() is (Phase.ROLLED_BACK if in_doubt else Phase.COMMITTED)
    serves = "d1" if in_doubt else "d2"
    assert bench.active == {"r0": serves, "r1": serves, "r2": serves}
    assert {bench.record(name).desired for name in bench.active} == {serves}
    assert bench.committed == ("v1" if in_doubt else "v2")


@pytest.mark.parametrize("count", restart_points("r1"))
def test_an_update_that_fails_is_rolled_back_under_a_new_leader(count: int) -> None:
    bench = after_acts(count, "r1")
    decided = bench.update.decision
    bench.lead_anew()
    assert bench.update.decision is decided
    for _ in acts(bench, "r1" if decided is Decision.NONE else ""):
        pass
    for seconds in (30, 400):  # a GO whose report was lost is waited for a little, then taken back
        bench.wait(seconds)
        bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert set(bench.active.values()) == {"d1"}
    assert set(bench.outcomes().values()) <= {Outcome.RESTORED, Outcome.FAILED, Outcome.PREPARED, Outcome.STAGING}
    assert bench.committed == "v1"


@pytest.mark.parametrize("failing", ["", "r1"])
def test_nobody_returning_to_a_new_leader_ends_the_update_too(failing: str) -> None:
    for count in restart_points(failing):
        bench = after_acts(count, failing)
        staging = bench.phase() is Phase.STAGING
        bench.lead_anew(attached=False)
        bench.wait(3000)
        assert bench.phase() is (Phase.ABORTED if staging else Phase.ROLLED_BACK)
        assert bench.committed == "v1"


def test_a_window_that_was_open_all_along_reports_to_the_new_leader() -> None:
    bench = after_acts(0)
    bench.prepare_all()
    order, _ = bench.take(o.Apply, "r0")
    bench.lead_anew(attached=False)
    for node in ("n0", "n1", "n2"):
        bench.agent(node, *bench.held[node])
    bench.replica("r0", "n0", open_window=bench.update.id)
    bench.active["r0"] = "d2"
    bench.do(e.Applied(*bench.who("r0"), order.update, order.ticket, "d2", WINDOW))
    for name in ("r1", "r2"):
        bench.replica(name, bench.homes[name])
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_a_report_lost_with_the_old_leader_is_found_in_hello() -> None:
    bench = after_acts(0)
    bench.prepare_all()
    bench.active["r0"] = "d2"
    bench.lead_anew()
    assert bench.outcomes()["r0"] is Outcome.APPLIED
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_no_lease_ends_before_a_new_leader_has_led_for_a_full_term() -> None:
    bench = after_acts(3)
    bench.lead_anew(attached=False)
    bench.wait(14)
    assert bench.phase() is Phase.STAGING
    bench.wait(2)
    assert bench.phase() is Phase.ABORTED


def test_the_new_leaders_numbers_are_not_the_old_ones() -> None:
    """Numbers start anew; an answer to the old leader's order of the same number is no answer."""
    bench = after_acts(0)
    bench.stage_all()
    old, _ = bench.take(o.Prepare, "r0")
    bench.lead_anew()
    bench.stage_all()
    new, _ = bench.waiting(o.Prepare, "r0")[0]
    assert old.ticket.epoch < new.ticket.epoch
    bench.do(e.Prepared(*bench.who("r0"), old.update, old.ticket, "d1"))
    bench.do(e.Prepared(*bench.who("r0"), old.update, type(old.ticket)(old.ticket.epoch, new.ticket.number), "d1"))
    assert bench.outcomes()["r0"] is Outcome.STAGING


def written(state: State) -> list[object]:
    tables: tuple[dict[object, object], ...] = (state.models, state.versions, state.updates, state.replicas)  # type: ignore[assignment]
    return [record for table in tables for record in table.values()]


@pytest.mark.parametrize("make", [lambda: after_acts(0), lambda: after_acts(9), lambda: after_acts(14, "r1")])
def test_every_record_is_read_back_as_it_was_written(make: Callable[[], Bench]) -> None:
    records = written(make().state)
    assert len(records) > 5
    for record in records:
        assert decode(type(record), encode(record)) == record


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"null", b'{"name": "m", "colour": 1}', b"\xff", b'{"name": 3']
)
def test_what_is_no_record_is_one_clear_error(data: bytes) -> None:
    opened = Opened("c", 1, {"model m": data}, 0)
    with pytest.raises(ValueError, match="no ModelRecord"):
        ledger.restored(opened, Bench().limits, 0.0)
