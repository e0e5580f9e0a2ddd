"""An update that goes as it should: staged, in waves, committed, told, and joined by late ones."""

import pytest
from tests.coordinator.rules.bench import Bench
from tests.coordinator.rules.fleets import committed_fleet, fleet

from hotweights.coordinator.rules import Declined
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Decision, Inflight, Kind, Options, Outcome, Phase
from hotweights.coordinator.rules.waves import plan_waves, share


def test_nothing_that_serves_is_touched_while_images_are_staged() -> None:
    bench = committed_fleet()
    bench.start("v2")
    assert {order.member for order, _ in bench.waiting(o.Stage)} >= {"n1", "n2"}
    assert not bench.going()
    assert [bench.record(f"r{i}").desired for i in range(3)] == ["d1"] * 3
    assert bench.phase() is Phase.STAGING


def test_nodes_stage_from_one_another_in_a_chain_that_begins_at_who_holds_the_image() -> None:
    bench = committed_fleet()
    bench.start("v2")
    sources = {order.member: stage.source_nodes for order, stage in bench.waiting(o.Stage) if stage.digest == "d2"}
    assert sources == {"n0": (), "n1": ("n0",), "n2": ("n1", "n0")}


def test_the_way_back_is_staged_before_anyone_is_prepared() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    assert [stage.digest for _, stage in bench.waiting(o.Stage, "n0")] == ["d2", "d1"]
    bench.stage("n0")
    assert not bench.waiting(o.Prepare)
    bench.stage("n0")
    assert [order.member for order, _ in bench.waiting(o.Prepare)] == ["r0"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_check_for_finite_values_is_ordered_only_where_it_was_asked_for(asked: bool) -> None:
    bench = committed_fleet(1)
    bench.start("v2", check_finite=asked)
    bench.stage("n0")
    bench.stage("n0")
    assert [prepare.check_finite for _, prepare in bench.waiting(o.Prepare)] == [asked]


def test_the_canary_goes_first_and_then_a_share_at_a_time() -> None:
    bench = committed_fleet(6)
    bench.start("v2", canary=1, max_unavailable="40%")
    bench.prepare_all()
    waves = []
    while bench.going():
        waves.append(bench.going())
        for replica in bench.going():
            bench.apply(replica)
    assert waves == [["r0"], ["r1", "r2"], ["r3", "r4"], ["r5"]]
    assert bench.phase() is Phase.COMMITTED


def test_no_wave_begins_before_the_one_before_it_is_through() -> None:
    bench = committed_fleet(4)
    bench.start("v2", canary=2)
    bench.prepare_all()
    bench.apply("r1")
    assert bench.going() == ["r0"]
    bench.apply("r0")
    assert bench.going() == ["r2", "r3"]


def test_replicas_that_are_away_count_as_unavailable() -> None:
    bench = committed_fleet(5)
    bench.leaves("r4")
    bench.start("v2", canary=1, max_unavailable="3")
    waves = sorted((m.wave, name) for name, m in bench.update.members.items())
    assert waves == [(0, "r0"), (1, "r1"), (1, "r2"), (2, "r3")]


def test_desired_is_durable_before_go_is_told() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.prepare_all()
    assert bench.record("r0").desired == "d2"
    assert bench.record("r1").desired == "d1"


def test_go_carries_how_it_is_to_be_done() -> None:
    bench = committed_fleet(1)
    bench.start("v2", inflight=Inflight.DRAIN, quiesce_deadline_s=7, apply_deadline_s=11)
    bench.prepare_all()
    go = bench.apply("r0")
    assert (go.digest, go.version, go.inflight) == ("d2", "v2", Inflight.DRAIN)
    assert (go.quiesce_deadline_s, go.apply_deadline_s, go.restore) == (7, 11, False)
    assert 0 < go.validity_s <= 60


def test_the_model_is_committed_by_the_last_report_and_not_before() -> None:
    bench = committed_fleet(3)
    bench.start("v2")
    bench.prepare_all()
    for replica in ("r0", "r2"):
        bench.apply(replica)
        assert (bench.committed, bench.update.decision) == ("v1", Decision.NONE)
    bench.apply("r1")
    assert (bench.committed, bench.update.decision) == ("v2", Decision.COMMIT)
    assert bench.state.models["m"].history[0] == "v1"


def test_everyone_is_told_that_the_update_is_over() -> None:
    bench = committed_fleet()
    bench.start("v2")
    bench.obey()
    assert {(order.member, end.committed) for order, end in bench.waiting(o.End)} == {
        ("r0", True),
        ("r1", True),
        ("r2", True),
    }


def test_windows_are_noted_with_their_times() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    bench.obey()
    (note,) = [note for note in bench.notes if note.kind is o.NoteKind.REPLICA_APPLIED]
    assert note.window is not None
    assert (note.replica, note.window.apply_ms, note.update) == ("r0", 2.0, bench.update.id)


def test_a_replica_that_joins_during_an_update_is_brought_up_after_the_commit() -> None:
    bench = committed_fleet(2)
    bench.agent("n9")
    bench.start("v2")
    bench.prepare_all()
    bench.replica("late", "n9", "d1")
    assert "late" not in bench.update.members
    assert not bench.catch_ups
    bench.apply("r0")
    bench.apply("r1")
    assert bench.phase() is Phase.COMMITTED
    assert bench.record("late").desired == "d2"
    bench.obey()
    (catch_up,) = bench.catch_ups
    assert (catch_up.phase, catch_up.target, catch_up.base) == (Phase.COMMITTED, "v2", "v1")
    assert bench.active["late"] == "d2"
    assert bench.committed == "v2"


def test_a_joiner_desires_what_is_committed_even_while_an_update_is_open() -> None:
    bench = committed_fleet(2)
    bench.agent("n9")
    bench.start("v2")
    bench.replica("late", "n9", "d1")
    assert bench.record("late").desired == "d1"


def test_an_unversioned_replica_is_brought_to_the_version_and_back_by_its_copies() -> None:
    bench = fleet(2)
    bench.replica("odd", "n1", "")
    bench.start("v2")
    staged = {(order.member, stage.digest) for order, stage in bench.waiting(o.Stage)}
    assert ("n1", "") not in staged
    bench.prepare_all()
    bench.apply("odd")
    bench.cancel(bench.update.id)
    _, go = bench.waiting(o.Apply, "odd")[0]
    assert (go.restore, go.digest) == (True, "")
    assert bench.record("odd").desired == ""


def test_a_replica_that_is_still_identifying_is_waited_for() -> None:
    bench = committed_fleet(1)
    bench.agent("n9")
    bench.replica("new", "n9", "", identifying=True)
    bench.start("v2")
    bench.obey()
    bench.wait(60)
    assert bench.outcomes() == {"new": Outcome.STAGING, "r0": Outcome.PREPARED}
    bench.active["new"] = "d1"
    bench.do(e.ActiveChanged(*bench.who("new"), "d1"))
    bench.obey()
    assert bench.phase() is Phase.COMMITTED
    assert bench.update.members["new"].base == "d1"


def test_a_replica_that_serves_the_target_already_opens_no_window() -> None:
    bench = committed_fleet(2)
    bench.active["r1"] = "d2"
    bench.do(e.ActiveChanged(*bench.who("r1"), "d2"))
    bench.orders.clear()
    bench.start("v2")
    bench.prepare_all()
    bench.apply("r0")
    assert bench.phase() is Phase.COMMITTED
    assert not [order for order in bench.told if isinstance(order.action, o.Apply) and order.member == "r1"]


def test_one_plan_leaves_an_empty_roster_without_waves() -> None:
    assert plan_waves([], Options()) == []


@pytest.mark.parametrize(
    ("text", "of", "count"),
    [("1", 10, 1), ("25%", 10, 2), ("1%", 10, 1), ("0", 10, 1), ("100%", 7, 7), ("33%", 3, 1), ("7", 3, 7)],
)
def test_a_share_is_rounded_down_and_at_least_one(text: str, of: int, count: int) -> None:
    assert share(text, of) == count


@pytest.mark.parametrize("text", ["", "%", "a", "-1", "1.5", "10%%", "٣", "1e3", "9" * 10])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(Declined, match="is no share"):
        share(text, 10)


def test_a_catch_up_without_go_gives_way_to_a_fleet_update() -> None:
    bench = committed_fleet(2)
    bench.agent("n9")
    bench.replica("late", "n9", "old")
    (catch_up,) = bench.catch_ups
    bench.stage_all()
    bench.start("v2")
    assert bench.state.updates[catch_up.id].phase is Phase.ABORTED
    bench.obey()
    assert bench.outcomes() == dict.fromkeys(["late", "r0", "r1"], Outcome.APPLIED)
    # It is nobody's failure.
    assert bench.record("late").failures == 0


def test_a_catch_up_that_has_go_is_waited_for() -> None:
    bench = committed_fleet(2)
    bench.agent("n9")
    bench.replica("late", "n9", "old")
    bench.prepare_all()
    assert bench.going() == ["late"]
    bench.start("v2")
    bench.prepare_all()
    assert bench.outcomes() == {"late": Outcome.STAGING, "r0": Outcome.PREPARED, "r1": Outcome.PREPARED}
    assert [order.member for order in bench.orders if isinstance(order.action, o.Prepare | o.Apply)] == ["late"]
    bench.apply("late")
    assert bench.catch_ups[0].phase is Phase.COMMITTED
    bench.obey()
    assert bench.phase() is Phase.COMMITTED
    assert bench.update.members["late"].base == "d1"


def test_a_catch_up_that_goes_back_is_waited_for_after_a_restart_too() -> None:
    """One outstanding order a replica, always: also where the new leader looks at the fleet update first."""
    bench = committed_fleet(2)
    bench.agent("n9")
    bench.replica("late", "n9", "old")
    bench.prepare_all()
    bench.start("v2")
    (catch_up,) = bench.catch_ups
    assert sorted([catch_up.id, bench.update.id]) == [catch_up.id, bench.update.id]
    bench.do(e.CancelAsked(bench.now, catch_up.id))
    bench.fail("late")
    assert bench.state.updates[catch_up.id].phase is Phase.ROLLING_BACK
    reverse(bench)
    bench.lead_anew()
    bench.stage_all()
    bench.replica("late", "n9")
    told = [(type(order.action), order.update) for order in bench.orders if order.member == "late"]
    assert told == [(o.Apply, catch_up.id)]


def reverse(bench: Bench) -> None:
    """A store gives its records back in an order of its own."""
    bench._records = dict(reversed(bench._records.items()))


def test_a_catch_up_backs_off_and_leaves_the_replica_alone_after_three() -> None:
    bench = committed_fleet(1)
    bench.agent("n9")
    bench.replica("late", "n9", "old")
    waited = []
    for _ in range(3):
        began = bench.now
        while not bench.waiting(o.Stage, "n9"):
            bench.wait(1, every=1)
        waited.append(bench.now - began)
        order, stage = bench.take(o.Stage, "n9")
        bench.orders.clear()
        bench.do(e.StageFailed(*bench.who("n9"), order.update, stage.digest, "disk full"))
    assert waited == [0, 5, 10]
    assert bench.record("late").excluded
    bench.wait(600)
    assert len(bench.catch_ups) == 3
    bench.do(e.ReplicaUndrained(bench.now, "late"))
    bench.obey()
    assert bench.active["late"] == "d1"
    assert (bench.record("late").excluded, bench.record("late").failures) == (False, 0)


def test_a_rollback_goes_to_the_version_before_and_holds_the_model() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    bench.obey()
    update = bench.start(kind=Kind.ROLLBACK)
    assert (update.target, update.base, update.kind) == ("v1", "v2", Kind.ROLLBACK)
    bench.obey()
    assert bench.committed == "v1"
    assert bench.state.models["m"].held
    assert bench.active == {"r0": "d1", "r1": "d1"}
    bench.do(e.ModelResumed(bench.now, "m"))
    assert not bench.state.models["m"].held


def test_two_rollbacks_go_two_versions_back() -> None:
    bench = committed_fleet(1)
    bench.publish("v3", "d3")
    bench.held["n0"].add("d3")
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3"}), 0, 0))
    for version in ("v2", "v3"):
        bench.start(version)
        bench.obey()
    for before in ("v2", "v1"):
        bench.start(kind=Kind.ROLLBACK)
        bench.obey()
        assert bench.committed == before
    refusal = bench.declined(e.UpdateAsked(bench.now, "m", "", Options(), Kind.ROLLBACK))
    assert refusal.reason == "NO_WAY_BACK"
