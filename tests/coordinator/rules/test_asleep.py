"""Replicas that are asleep when GO comes: the update waits for them, and calls them back at once when it goes back."""

from typing import Any

from tests.coordinator.rules.bench import Bench
from tests.coordinator.rules.fleets import committed_fleet, fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Kind, Outcome, Phase

HOUR_S = 3600.0


def asleep(replicas: int = 2, **options: Any) -> Bench:
    """An update in its last wave whose last replica has deferred its window."""
    bench = fleet(replicas)
    bench.start("v2", **options)
    bench.prepare_all()
    bench.apply("r0")
    bench.defer("r1")
    return bench


def test_an_update_waits_for_one_that_sleeps_and_commits_when_it_has_applied() -> None:
    bench = asleep()
    bench.wait(HOUR_S / 2)
    assert bench.phase() is Phase.APPLYING
    assert bench.update.members["r1"].reason == "asleep at level 1"
    assert [note.kind for note in bench.notes].count(o.NoteKind.REPLICA_DEFERRED) == 1
    bench.apply("r1")
    assert bench.phase() is Phase.COMMITTED


def test_said_twice_it_is_noted_once_and_the_deadline_is_not_put_off_again() -> None:
    bench = asleep(asleep_deadline_s=100)
    bench.wait(90)
    bench.defer("r1")
    assert [note.kind for note in bench.notes].count(o.NoteKind.REPLICA_DEFERRED) == 1
    bench.wait(1000)
    assert bench.update.members["r1"].outcome is not Outcome.APPLYING


def test_one_that_never_wakes_fails_after_the_deadline_of_sleep() -> None:
    bench = asleep(asleep_deadline_s=100)
    bench.wait(2000)
    assert bench.phase() is not Phase.APPLYING
    assert "no report came in time" in bench.update.reason


def test_a_cancel_calls_a_sleeper_back_at_once() -> None:
    bench = asleep()
    bench.cancel(bench.update.id)
    assert bench.phase() is Phase.ROLLING_BACK
    # Both are told to go back in this very step: the sleeper has nothing to undo and says so.
    assert [order.member for order, go in bench.waiting(o.Apply) if go.restore] == ["r0", "r1"]
    bench.orders = [order for order in bench.orders if not (order.member == "r1" and not order.action.restore)]  # type: ignore[union-attr]
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.outcomes() == {"r0": Outcome.RESTORED, "r1": Outcome.RESTORED}


def test_a_new_leader_is_told_again_and_waits_as_long() -> None:
    bench = asleep()
    order = bench.waiting(o.Apply, "r1")[0][0]
    bench.lead_anew(attached=False)
    for node in ("n0", "n1"):
        bench.agent(node, *bench.held[node])
    bench.replica("r0", "n0")
    bench.replica("r1", "n1", open_window=order.update)
    bench.orders.append(order)
    bench.defer("r1")
    bench.wait(HOUR_S / 2)
    assert bench.phase() is Phase.APPLYING
    bench.apply("r1")
    assert bench.phase() is Phase.COMMITTED


def test_a_catch_up_that_waits_for_a_wake_gives_way_to_a_fleet_update() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.obey()
    bench.replica("r2", "n0", "d1")
    bench.prepare_all()
    bench.defer("r2")
    (catch_up,) = bench.catch_ups
    bench.start("v1", Kind.ROLLBACK)
    assert bench.catch_ups[0].phase is Phase.ROLLING_BACK
    order = bench.waiting(o.Apply, "r2")[0][0]
    bench.orders.remove(order)  # the GO it never acted on
    bench.obey()
    assert bench.state.updates[catch_up.id].phase is Phase.ROLLED_BACK
    assert bench.phase() is Phase.COMMITTED
    assert set(bench.outcomes()) == {"r0", "r1", "r2"}


def test_a_report_of_sleep_that_answers_no_outstanding_order_changes_nothing() -> None:
    bench = asleep()
    order = bench.waiting(o.Apply, "r1")[0][0]
    bench.apply("r1")
    records = bench.state.updates
    bench.do(e.Deferred(*bench.who("r1"), order.update, order.ticket, "asleep"))
    assert bench.state.updates == records
    assert not [note for note in bench.notes[-1:] if note.kind is o.NoteKind.REPLICA_DEFERRED]


def test_one_that_deferred_what_is_over_by_now_is_called_back() -> None:
    bench = asleep()
    order = bench.waiting(o.Apply, "r1")[0][0]
    bench.leaves("r1")
    bench.cancel(bench.update.id)
    bench.obey()
    bench.wait(2000)
    assert bench.phase() is Phase.ROLLED_BACK
    bench.orders.clear()
    bench.replica("r1", "n1", open_window=order.update)
    bench.do(e.Deferred(*bench.who("r1"), order.update, order.ticket, "asleep"))
    assert bench.waiting(o.End, "r1")


def test_a_way_back_that_was_lost_with_the_stream_is_told_again() -> None:
    bench = asleep()
    order = bench.waiting(o.Apply, "r1")[0][0]
    bench.cancel(bench.update.id)
    assert bench.update.members["r1"].outcome is Outcome.RESTORING
    bench.leaves("r1")
    bench.orders = [told for told in bench.orders if told.member != "r1"]
    bench.replica("r1", "n1", open_window=order.update)
    assert not bench.waiting(o.Apply, "r1")
    bench.do(e.Deferred(*bench.who("r1"), order.update, order.ticket, "asleep"))
    (again,) = [go for _, go in bench.waiting(o.Apply, "r1")]
    assert again.restore
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
