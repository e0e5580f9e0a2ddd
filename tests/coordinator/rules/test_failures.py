"""What goes wrong: cancels, failures under either policy, silence, and replicas that cannot go back."""

from typing import Any

import pytest
from tests.coordinator.rules.bench import WINDOW, Bench
from tests.coordinator.rules.fleets import committed_fleet, fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Decision, FailurePolicy, Outcome, Phase
from hotweights.coordinator.rules.state import Limits

EVICT = FailurePolicy.EVICT


def ready(count: int = 3, **options: Any) -> Bench:
    """A fleet on v1 whose update to v2 has its canary's GO out."""
    bench = committed_fleet(count)
    bench.start("v2", **options)
    bench.prepare_all()
    assert bench.going() == ["r0"]
    return bench


def nobody_was_touched(bench: Bench) -> bool:
    return not [order for order in bench.told if isinstance(order.action, o.Apply)]


def test_a_cancel_while_staging_aborts_and_nobody_is_touched() -> None:
    bench = committed_fleet()
    bench.start("v2")
    bench.stage_all()
    bench.cancel(bench.update.id)
    assert (bench.phase(), bench.update.decision) == (Phase.ABORTED, Decision.ABORT)
    assert bench.update.reason == "cancelled"
    assert nobody_was_touched(bench)
    assert bench.committed == "v1"


def test_a_cancel_while_applying_takes_everyone_back() -> None:
    bench = ready(3)
    bench.apply("r0")
    bench.apply("r2")
    bench.cancel(bench.update.id)
    assert (bench.phase(), bench.update.decision) == (Phase.ROLLING_BACK, Decision.ABORT)
    assert [bench.record(f"r{i}").desired for i in range(3)] == ["d1"] * 3
    # r1 has its GO out: it is waited for, then taken back as well.
    assert bench.outcomes() == {"r0": Outcome.RESTORING, "r1": Outcome.APPLYING, "r2": Outcome.RESTORING}
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert set(bench.outcomes().values()) == {Outcome.RESTORED}
    assert bench.active == {"r0": "d1", "r1": "d1", "r2": "d1"}
    assert bench.committed == "v1"


def test_the_way_back_is_an_order_to_restore_the_base() -> None:
    bench = ready(2)
    bench.apply("r0")
    bench.cancel(bench.update.id)
    order, back = bench.waiting(o.Apply, "r0")[0]
    assert (back.restore, back.digest, back.version, order.update) == (True, "d1", "v1", bench.update.id)


def test_the_way_back_names_the_version_each_replica_came_from() -> None:
    bench = committed_fleet(3)
    bench.publish("v0", "d0")
    bench.replica("r1", "n1", "d0")
    bench.orders.clear()
    bench.start("v2")
    bench.prepare_all()
    for replica in ("r0", "r1"):
        bench.apply(replica)
    bench.cancel(bench.update.id)
    ways = {order.member: (back.digest, back.version) for order, back in bench.waiting(o.Apply) if back.restore}
    assert ways == {"r0": ("d1", "v1"), "r1": ("d0", "v0")}


def test_a_cancel_after_the_commit_is_declined_and_after_an_abort_is_nothing() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    bench.obey()
    refusal = bench.declined(e.CancelAsked(bench.now, bench.update.id))
    assert (refusal.kind, refusal.reason) == ("FAILED_PRECONDITION", "UPDATE_COMMITTED")
    bench = committed_fleet(1)
    bench.start("v2")
    bench.cancel(bench.update.id)
    ended = bench.update
    bench.cancel(ended.id)
    assert bench.update == ended


def test_cancelling_an_unknown_update_is_declined() -> None:
    assert committed_fleet(1).declined(e.CancelAsked(0.0, "m.99")).reason == "UPDATE_UNKNOWN"


def test_a_failed_preparation_aborts_with_nobody_applied() -> None:
    bench = committed_fleet()
    bench.start("v2")
    bench.stage_all()
    bench.prepare("r0")
    order, _ = bench.take(o.Prepare, "r1")
    bench.do(e.PrepareFailed(*bench.who("r1"), order.update, order.ticket, "tensor a.b: shape 4x4, not 4x8"))
    assert bench.phase() is Phase.ABORTED
    assert "r1: tensor a.b: shape 4x4" in bench.update.reason
    assert nobody_was_touched(bench)


def test_a_failed_apply_takes_all_back_and_says_why() -> None:
    bench = ready(3)
    bench.apply("r0")
    bench.fail("r1", "out of memory")
    assert bench.phase() is Phase.ROLLING_BACK
    assert "r1: out of memory" in bench.update.reason
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert set(bench.active.values()) == {"d1"}
    (ended,) = [note for note in bench.notes if note.kind is o.NoteKind.UPDATE_ENDED]
    assert "r1: out of memory" in ended.message


@pytest.mark.parametrize("how", ["failed", "torn"])
def test_a_failed_canary_rolls_back_under_evict_too(how: str) -> None:
    bench = ready(10, failure_policy=EVICT, max_failed="5")
    bench.fail("r0", torn=how == "torn")
    assert bench.phase() in (Phase.ROLLING_BACK, Phase.ROLLED_BACK)
    assert not bench.record("r0").excluded


def test_evict_leaves_failures_behind_up_to_max_failed() -> None:
    bench = ready(4, failure_policy=EVICT, max_failed="2")
    for act, replica in ((bench.apply, "r0"), (bench.fail, "r1"), (bench.fail, "r2"), (bench.apply, "r3")):
        act(replica)
    assert bench.phase() is Phase.COMMITTED
    assert bench.outcomes()["r1"] is Outcome.EXCLUDED
    assert [bench.record(f"r{i}").excluded for i in range(4)] == [False, True, True, False]
    # What they serve is what they should serve: the version of before.
    assert (bench.record("r1").desired, bench.active["r1"]) == ("d1", "d1")
    bench.wait(100)
    assert not bench.catch_ups


def test_evict_rolls_back_beyond_max_failed() -> None:
    bench = ready(5, failure_policy=EVICT, max_failed="1")
    bench.apply("r0")
    bench.fail("r1")
    assert bench.phase() is Phase.APPLYING
    bench.fail("r2")
    assert bench.phase() is Phase.ROLLING_BACK
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert set(bench.active.values()) == {"d1"}


def test_evict_commits_nothing_without_a_success() -> None:
    bench = committed_fleet(2)
    bench.start("v2", failure_policy=EVICT, max_failed="2")
    bench.stage_all()
    for replica in ("r0", "r1"):
        order, _ = bench.take(o.Prepare, replica)
        bench.do(e.PrepareFailed(*bench.who(replica), order.update, order.ticket, "no room"))
    assert bench.phase() is Phase.ABORTED
    assert bench.committed == "v1"


def test_an_undrained_replica_catches_up() -> None:
    bench = ready(3, failure_policy=EVICT)
    bench.apply("r0")
    bench.fail("r1")
    bench.apply("r2")
    bench.obey()
    bench.do(e.ReplicaUndrained(bench.now, "r1"))
    bench.obey()
    assert bench.active["r1"] == "d2"
    assert bench.record("r1").desired == "d2"


def test_a_replica_lost_before_go_ends_the_update_with_nobody_applied() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.stage_all()
    bench.leaves("r1")
    bench.prepare("r0")
    bench.wait(10)
    assert bench.phase() is Phase.STAGING
    bench.wait(10)
    assert bench.phase() is Phase.ABORTED
    assert "r1: out of contact" in bench.update.reason
    assert nobody_was_touched(bench)


def test_no_go_is_told_in_the_same_breath_as_the_abort() -> None:
    """r2 is lost when the wave of r1 and r2 begins."""
    bench = ready(3)
    bench.leaves("r2")
    bench.wait(10)
    bench.now += 10
    bench.apply("r0")
    assert bench.phase() is Phase.ROLLING_BACK
    assert [order.action.digest for order, _ in bench.waiting(o.Apply) if isinstance(order.action, o.Apply)] == ["d1"]


def test_a_replica_back_within_its_lease_is_no_loss() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.stage_all()
    bench.leaves("r1")
    bench.wait(10)
    bench.replica("r1", "n1")
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_a_leader_that_was_stopped_holds_the_time_against_nobody() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.stage_all()
    bench.now += 5000
    bench.do(e.Ticked(bench.now, overslept_s=5000.0))
    bench.leaves("r1")  # its stream broke meanwhile; it tries again every few seconds
    assert not bench.drops
    bench.wait(10)
    assert bench.phase() is Phase.STAGING
    bench.replica("r1", "n1")
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_a_go_that_is_out_keeps_its_time_when_the_leader_was_stopped() -> None:
    bench = ready(2)
    bench.now += 5000
    bench.do(e.Ticked(bench.now, overslept_s=5000.0))
    bench.wait(60)
    assert bench.phase() is Phase.APPLYING
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_who_stays_away_after_the_leader_was_stopped_is_lost_as_ever() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.now += 5000
    bench.do(e.Ticked(bench.now, overslept_s=5000.0))
    bench.leaves("r1")
    bench.wait(20)
    assert (bench.phase(), bench.outcomes()["r1"]) == (Phase.ABORTED, Outcome.FAILED)


def test_a_replica_that_is_silent_after_go_is_taken_back_and_never_taken_for_untouched() -> None:
    bench = ready(3)
    bench.apply("r0")
    bench.apply("r2")
    bench.leaves("r1")
    bench.wait(60)
    assert bench.phase() is Phase.APPLYING
    began = bench.now
    while bench.phase() is Phase.APPLYING:
        bench.wait(5)
    assert bench.now - began < 600
    assert bench.update.decision is Decision.ABORT
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.outcomes() == {"r0": Outcome.RESTORED, "r1": Outcome.DIVERGED, "r2": Outcome.RESTORED}
    assert "r1" in bench.update.reason


def test_a_diverged_replica_is_brought_back_when_it_returns() -> None:
    bench = ready(2)
    bench.apply("r0")
    bench.leaves("r1")
    bench.active["r1"] = "d2"
    bench.wait(600)
    bench.obey()
    assert bench.outcomes()["r1"] is Outcome.DIVERGED
    bench.replica("r1", "n1")
    bench.obey()
    assert bench.active["r1"] == "d1"
    assert bench.catch_ups[-1].phase is Phase.COMMITTED


def test_a_diverged_replica_is_brought_back_where_nothing_was_ever_committed() -> None:
    bench = fleet(2)
    bench.start("v2")
    bench.prepare_all()
    bench.apply("r0")
    bench.leaves("r1")
    bench.active["r1"] = "d2"
    bench.wait(600)
    bench.obey()
    assert (bench.phase(), bench.committed) == (Phase.ROLLED_BACK, "")
    bench.replica("r1", "n1")
    bench.obey()
    assert bench.record("r1").desired == "d1"
    assert bench.active["r1"] == "d1"


def test_a_replica_that_restarts_in_its_window_fails_and_is_brought_to_its_base() -> None:
    bench = ready(2)
    bench.wait(60)
    bench.apply("r0")
    bench.leaves("r1")
    bench.replica("r1", "n1", "d2x", new_life=True)
    assert bench.phase() is Phase.ROLLING_BACK
    bench.obey()
    assert bench.outcomes() == {"r0": Outcome.RESTORED, "r1": Outcome.RESTORED}
    assert set(bench.active.values()) == {"d1"}


def test_a_go_that_is_out_keeps_its_time_when_the_update_is_cancelled() -> None:
    bench = committed_fleet(2)
    bench.start("v2", apply_deadline_s=2000)
    bench.prepare_all()
    bench.cancel(bench.update.id)
    bench.wait(3900)
    assert bench.outcomes()["r0"] is Outcome.APPLYING
    while bench.outcomes()["r0"] is Outcome.APPLYING:
        bench.wait(5)
    bench.take(o.Apply, "r0")
    bench.apply("r0")
    assert bench.outcomes()["r0"] is Outcome.RESTORED
    assert bench.phase() is Phase.ROLLED_BACK


def test_a_torn_replica_is_told_nothing_more() -> None:
    bench = ready(3)
    bench.apply("r0")
    bench.fail("r1", "rank 3 is silent", torn=True)
    bench.apply("r2")
    bench.obey()
    assert bench.outcomes() == {"r0": Outcome.RESTORED, "r1": Outcome.TORN, "r2": Outcome.RESTORED}
    applies = [order for order in bench.told if isinstance(order.action, o.Apply) and order.member == "r1"]
    assert len(applies) == 1


def test_a_replica_that_cannot_go_back_diverges_and_is_caught_up() -> None:
    bench = ready(2)
    bench.apply("r0")
    bench.cancel(bench.update.id)
    bench.apply("r1")
    bench.fail("r1", "no room for the way back")
    bench.obey()
    assert bench.outcomes()["r1"] is Outcome.DIVERGED
    assert bench.phase() is Phase.ROLLED_BACK
    bench.wait(10)
    bench.obey()
    assert bench.active["r1"] == "d1"


def test_a_late_report_tells_what_a_given_up_replica_serves() -> None:
    """It hung past every deadline and then finished: status says what is true, and it is brought back."""
    bench = ready(2)
    bench.apply("r0")
    go, _ = bench.take(o.Apply, "r1")
    bench.wait(900)
    back, _ = bench.take(o.Apply, "r1")
    assert bench.outcomes()["r1"] is Outcome.DIVERGED
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    bench.active["r1"] = "d2"
    late = bench.who("r1")
    bench.do(e.Applied(*late, go.update, go.ticket, "d2", WINDOW))
    bench.do(e.ApplyFailed(*late, back.update, back.ticket, "EXPIRED", "d2"))
    assert bench.state.seats["r1"].active == "d2"
    bench.obey()
    assert bench.active["r1"] == "d1"


def test_a_way_back_that_was_lost_behind_a_hung_window_is_made_up_for() -> None:
    """It reconnects inside the hung window, so that the new order seems to be under way; it never arrived."""
    bench = ready(2)
    bench.apply("r0")
    go, _ = bench.take(o.Apply, "r1")
    while bench.outcomes()["r1"] is Outcome.APPLYING:
        bench.wait(5)
    bench.replica("r1", "n1", open_window=bench.update.id)
    bench.obey()
    assert bench.outcomes()["r1"] is Outcome.RESTORING
    bench.active["r1"] = "d2"
    bench.do(e.Applied(*bench.who("r1"), go.update, go.ticket, "d2", WINDOW))
    bench.wait(600)
    assert bench.phase() is Phase.ROLLED_BACK
    bench.obey()
    assert bench.active["r1"] == "d1"


def test_a_catch_up_that_goes_back_wants_its_base_until_it_is_over() -> None:
    bench = committed_fleet(1)
    bench.agent("n9", "d1", "d2")
    bench.replica("late", "n9", "d2")
    bench.prepare_all()
    bench.fail("late")
    assert bench.record("late").desired == "d2"
    bench.apply("late")
    assert bench.record("late").desired == "d1"


def test_a_report_older_than_one_already_heard_says_nothing_of_what_is_served() -> None:
    bench = ready(2)
    bench.apply("r0")
    go, _ = bench.waiting(o.Apply, "r1")[0]
    bench.cancel(bench.update.id)
    bench.apply("r1")
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    bench.do(e.Applied(*bench.who("r1"), go.update, go.ticket, "d2", WINDOW))
    assert bench.state.seats["r1"].active == "d1"


def test_a_node_without_an_agent_fails_its_replicas() -> None:
    bench = committed_fleet(1)
    bench.replica("r9", "n9", "d1")
    bench.wait(30)
    bench.start("v2")
    bench.wait(5)
    assert bench.phase() is Phase.STAGING  # an agent that was never seen has a lease to attach
    bench.wait(15)
    assert bench.phase() is Phase.ABORTED
    assert "no agent on node n9" in bench.update.reason


def test_staging_that_takes_too_long_aborts_and_names_who_is_late() -> None:
    bench = committed_fleet(2)
    bench.start("v2", staging_deadline_s=100)
    while bench.waiting(o.Stage, "n0"):
        bench.stage("n0")
    bench.prepare("r0")
    bench.wait(110)
    assert bench.phase() is Phase.ABORTED
    assert "r1" in bench.update.reason
    assert "r0" not in bench.update.reason


def test_a_replica_that_never_prepares_again_does_not_hold_the_update_open() -> None:
    """It reconnected between two waves, lives, and does not answer its Prepare."""
    bench = ready(2)
    bench.replica("r1", "n1")
    bench.apply("r0")
    assert bench.outcomes()["r1"] is Outcome.STAGING
    bench.wait(4000)
    assert not bench.phase().is_open
    assert bench.committed == "v1"


def test_a_replica_that_moved_to_another_model_is_told_nothing_of_the_old_one() -> None:
    bench = ready(2)
    bench.leaves("r1")
    bench.replica("r1", "n1", "x1", model="other", new_life=True)
    bench.apply("r0")
    assert "r1" not in bench.going()
    bench.obey("r1")
    bench.wait(100)
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.active == {"r0": "d1", "r1": "x1"}


def test_everyone_gone_for_good_still_ends_the_update() -> None:
    bench = ready(3)
    for member in list(bench.sessions):
        bench.leaves(member)
    bench.wait(2000, beating=False)
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.outcomes()["r0"] is Outcome.DIVERGED


def test_the_long_lost_are_forgotten_unless_something_is_owed_to_them() -> None:
    bench = committed_fleet(3, limits=Limits(forget_s=100))
    bench.start("v2")
    bench.prepare_all()
    bench.leaves("r1")
    bench.leaves("n1")
    bench.wait(50)
    assert "r1" in bench.state.seats
    bench.wait(1500)
    bench.obey()
    assert "r1" not in bench.state.seats
    assert "r1" not in bench.state.replicas
    assert "n1" not in bench.state.nodes
