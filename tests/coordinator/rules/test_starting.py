"""What starts an update: people, publishers and the policy; what refuses one, each with its reason."""

from typing import Any

import pytest
from tests.coordinator.rules.bench import Bench
from tests.coordinator.rules.fleets import committed_fleet, fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.orders import Declined
from hotweights.coordinator.rules.records import Kind, Options, Phase, Policy
from hotweights.coordinator.rules.state import Limits


def asked(version: str = "v2", model: str = "m", **options: Any) -> e.UpdateAsked:
    return e.UpdateAsked(1000.0, model, version, Options(**options))


def refused(bench: Bench, event: e.Event) -> tuple[str, str]:
    refusal = bench.declined(event)
    return refusal.kind, refusal.reason


def test_a_second_update_is_refused_and_names_the_open_one() -> None:
    bench = committed_fleet()
    bench.start("v2")
    refusal = bench.declined(asked("v1"))
    assert (refusal.kind, refusal.reason) == ("FAILED_PRECONDITION", "UPDATE_OPEN")
    assert refusal.fields["update"] == bench.update.id
    assert bench.update.id in refusal.message


def test_an_update_is_refused_with_nobody_attached() -> None:
    bench = Bench()
    bench.agent("n1", "d2")
    bench.publish("v2", "d2")
    assert refused(bench, asked()) == ("FAILED_PRECONDITION", "NO_REPLICA")


def test_a_replica_that_left_is_nobody() -> None:
    bench = committed_fleet(1)
    bench.leaves("r0")
    assert refused(bench, asked()) == ("FAILED_PRECONDITION", "NO_REPLICA")


def test_an_update_is_refused_without_a_source() -> None:
    bench = committed_fleet()
    bench.leaves("n0")
    assert refused(bench, asked()) == ("FAILED_PRECONDITION", "NO_SOURCE")


def test_an_update_to_what_is_committed_is_refused() -> None:
    assert refused(committed_fleet(), asked("v1")) == ("FAILED_PRECONDITION", "ALREADY_COMMITTED")


def test_an_update_to_an_unknown_version_or_model_is_refused() -> None:
    bench = committed_fleet()
    assert refused(bench, asked("v9")) == ("NOT_FOUND", "VERSION_UNKNOWN")
    assert refused(bench, asked("v2", model="other")) == ("NOT_FOUND", "MODEL_UNKNOWN")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("max_unavailable", "many", "BAD_SHARE"),
        ("max_failed", "-1", "BAD_SHARE"),
        ("staging_deadline_s", 0.0, "BAD_DEADLINE"),
        ("quiesce_deadline_s", -1.0, "BAD_DEADLINE"),
        ("apply_deadline_s", 1e9, "BAD_DEADLINE"),
        ("apply_deadline_s", float("nan"), "BAD_DEADLINE"),
    ],
)
def test_options_no_update_can_follow_are_refused(option: str, value: Any, reason: str) -> None:
    assert refused(committed_fleet(), asked(**{option: value})) == ("INVALID_ARGUMENT", reason)


def test_a_rollback_with_nothing_before_is_refused_and_holds_nothing() -> None:
    bench = fleet()
    refusal = bench.declined(e.UpdateAsked(1000.0, "m", "", Options(), Kind.ROLLBACK))
    assert refusal.reason == "NO_WAY_BACK"
    assert not bench.state.models["m"].held


def test_the_empty_version_is_the_newest() -> None:
    bench = committed_fleet()
    assert bench.start("").target == "v2"


# Publishing.


def test_the_same_version_again_is_fine_and_other_content_is_not() -> None:
    bench = committed_fleet(1)
    before = bench.state
    bench.publish("v2", "d2")
    assert bench.state.versions == before.versions
    refusal = bench.declined(e.VersionPublished(0.0, "m", "v2", "dX", 1, 1, 1))
    assert (refusal.kind, refusal.reason) == ("ALREADY_EXISTS", "VERSION_EXISTS")
    assert refusal.fields == {"existing_digest": "d2", "offered_digest": "dX"}
    assert "d2" in refusal.message
    assert "dX" in refusal.message


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "é", "\x1b[31m", "a" * 201, "٣"])
def test_names_are_plain(name: str) -> None:
    bench = Bench()
    assert refused(bench, e.VersionPublished(0.0, "m", name, "d", 1, 1, 1)) == ("INVALID_ARGUMENT", "BAD_NAME")
    if name:
        assert refused(bench, e.VersionPublished(0.0, name, "v", "d", 1, 1, 1)) == ("INVALID_ARGUMENT", "BAD_NAME")


@pytest.mark.parametrize("name", [" ", "a b", "a\n", "\x1b[31m", "a" * 201])
def test_members_names_are_plain(name: str) -> None:
    bench = committed_fleet(1)
    hello = e.ReplicaAttached(0.0, name, "s", "i", "m", None, ((0, "n0", 1),), "")
    assert refused(bench, hello) == ("INVALID_ARGUMENT", "BAD_NAME")
    hello = e.ReplicaAttached(0.0, "r", "s", "i", name, None, ((0, "n0", 1),), "")
    assert refused(bench, hello) == ("INVALID_ARGUMENT", "BAD_NAME")
    hello = e.ReplicaAttached(0.0, "r", "s", "i", "m", None, ((0, name, 1),), "")
    assert refused(bench, hello) == ("INVALID_ARGUMENT", "BAD_NAME")
    assert refused(bench, e.AgentAttached(0.0, name, "s", "i", "", frozenset())) == ("INVALID_ARGUMENT", "BAD_NAME")


def test_sequences_rise_by_one() -> None:
    bench = committed_fleet(1)
    bench.publish("v3", "d3")
    assert [bench.state.versions["m", f"v{i}"].sequence for i in (1, 2, 3)] == [1, 2, 3]


def test_a_version_published_to_start_waits_until_someone_holds_it_and_someone_is_attached() -> None:
    bench = Bench()
    bench.publish("v1", "d1", start=True)
    assert not bench.state.updates
    bench.agent("n1")
    bench.replica("r1", "n1", "d0")
    assert not bench.state.updates
    bench.do(e.HeldChanged(*bench.who("n1"), frozenset({"d1"}), 0, 0))
    bench.obey()
    assert (bench.committed, bench.active["r1"]) == ("v1", "d1")


def test_a_version_published_to_start_waits_for_the_open_update() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    bench.publish("v3", "d3", start=True)
    bench.held["n0"].add("d3")
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset(bench.held["n0"]), 0, 0))
    assert len([u for u in bench.state.updates.values() if u.phase.is_open]) == 1
    bench.obey()
    assert bench.committed == "v3"


def test_a_start_is_asked_for_once() -> None:
    """A publication that is sent again must not undo a rollback."""
    bench = committed_fleet(1)
    bench.publish("v3", "d3", start=True)
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3"}), 0, 0))
    bench.obey()
    assert bench.committed == "v3"
    bench.publish("v3", "d3", start=True)
    bench.start(kind=Kind.ROLLBACK)
    bench.obey()
    bench.wait(30)
    assert bench.committed == "v1"


def test_a_start_that_a_newer_version_overtook_is_not_made_up_for() -> None:
    bench = committed_fleet(1)
    bench.publish("v3", "d3", start=True)
    bench.publish("v4", "d4")
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d4"}), 0, 0))
    bench.start("v4")
    bench.obey()
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3", "d4"}), 0, 0))
    bench.obey()
    bench.wait(30)
    assert bench.committed == "v4"


# Policies.


def automatic(count: int = 1) -> Bench:
    bench = committed_fleet(count)
    bench.start("v2")
    bench.obey()
    bench.do(e.PolicySet(bench.now, "m", Policy.AUTO))
    return bench


def publish_v3(bench: Bench) -> None:
    bench.publish("v3", "d3")
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3"}), 0, 0))


def test_under_auto_a_version_that_becomes_available_starts() -> None:
    bench = automatic()
    bench.publish("v3", "d3")
    assert bench.update.target == "v2"
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3"}), 0, 0))
    bench.obey()
    assert bench.committed == "v3"


def test_under_manual_nothing_starts_by_itself() -> None:
    bench = committed_fleet(1)
    bench.do(e.PolicySet(bench.now, "m", Policy.MANUAL))
    publish_v3(bench)
    bench.wait(30)
    assert bench.committed == "v1"
    assert bench.update.target == "v1"


def test_under_auto_a_version_that_failed_is_not_tried_again_until_resumed() -> None:
    bench = automatic()
    publish_v3(bench)
    bench.prepare_all()
    bench.fail("r0")
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    bench.wait(60)
    assert bench.phase() is Phase.ROLLED_BACK
    assert (bench.committed, bench.update.target) == ("v2", "v3")
    bench.do(e.ModelResumed(bench.now, "m"))
    bench.obey()
    assert bench.committed == "v3"


def test_a_rollback_holds_auto_until_resumed() -> None:
    bench = automatic()
    publish_v3(bench)
    bench.obey()
    bench.start(kind=Kind.ROLLBACK)
    bench.obey()
    bench.publish("v4", "d4")
    bench.do(e.HeldChanged(*bench.who("n0"), frozenset({"d1", "d2", "d3", "d4"}), 0, 0))
    bench.wait(60)
    assert (bench.committed, bench.state.models["m"].held) == ("v2", True)
    bench.do(e.ModelResumed(bench.now, "m"))
    bench.obey()
    assert bench.committed == "v4"


def test_resuming_an_unknown_model_is_declined() -> None:
    assert refused(Bench(), e.ModelResumed(0.0, "m")) == ("NOT_FOUND", "MODEL_UNKNOWN")


def test_the_first_replica_that_asks_for_a_policy_sets_it_and_none_after() -> None:
    bench = committed_fleet(1)
    bench.replica("a", "n0", "d1", policy=Policy.AUTO)
    bench.replica("b", "n0", "d1", policy=Policy.MANUAL)
    assert bench.state.models["m"].policy is Policy.AUTO


def test_a_replica_follows_the_only_model_or_must_name_one() -> None:
    bench = Bench()
    assert refused(bench, hello_without_model()) == ("FAILED_PRECONDITION", "MODEL_UNCLEAR")
    bench.publish("v1", "d1")
    bench.do(hello_without_model())
    assert bench.state.seats["r"].model == "m"
    bench.do(e.VersionPublished(0.0, "zoo", "v1", "d7", 1, 1, 1))
    refusal = bench.declined(hello_without_model(name="r2"))
    assert (refusal.reason, refusal.fields["models"]) == ("MODEL_UNCLEAR", "m, zoo")


def hello_without_model(name: str = "r") -> e.ReplicaAttached:
    return e.ReplicaAttached(0.0, name, "s", "i", "", None, ((0, "n", 1),), "")


# Who may be here.


def test_another_live_process_of_the_same_id_is_declined() -> None:
    bench = committed_fleet(1)
    other = e.ReplicaAttached(bench.now, "r0", "s", "another life", "m", None, ((0, "n0", 1),), "d1")
    assert refused(bench, other) == ("ALREADY_EXISTS", "MEMBER_EXISTS")
    agent = e.AgentAttached(bench.now, "n0", "s", "another life", "", frozenset())
    assert refused(bench, agent) == ("ALREADY_EXISTS", "MEMBER_EXISTS")


def test_the_same_process_replaces_its_older_stream() -> None:
    bench = committed_fleet(1)
    older = bench.sessions["r0"]
    bench.replica("r0", "n0")
    assert [drop.session for drop in bench.drops] == [older]
    bench.do(e.Left(bench.now, "r0", older))
    assert bench.state.seats["r0"].connected


def test_a_silent_member_loses_its_seat_after_its_lease() -> None:
    bench = committed_fleet(1)
    bench.wait(14, beating=False)
    assert bench.state.seats["r0"].connected
    bench.wait(2, beating=False)
    assert not bench.state.seats["r0"].connected
    assert not bench.state.nodes["n0"].connected
    assert {drop.session for drop in bench.drops} == {bench.sessions["r0"], bench.sessions["n0"]}


def test_inside_a_window_the_windows_deadline_takes_the_place_of_the_lease() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    bench.prepare_all()
    bench.wait(60, beating=False)
    assert bench.state.seats["r0"].connected
    assert not bench.state.nodes["n0"].connected


# Versions that go.


def test_versions_beyond_keep_go_but_never_pinned_ones() -> None:
    bench = committed_fleet(1, limits=Limits(keep_versions=1))
    bench.start("v2")
    bench.obey()
    for i in range(3, 7):
        bench.publish(f"v{i}", f"d{i}")
    # v2 is committed, v1 is the way back, v6 is the newest.
    assert sorted(name for _, name in bench.state.versions) == ["v1", "v2", "v6"]


def test_all_versions_are_kept_unless_told() -> None:
    bench = committed_fleet(1)
    for i in range(3, 60):
        bench.publish(f"v{i}", f"d{i}")
    assert len(bench.state.versions) == 59


def test_what_an_open_update_needs_cannot_be_deleted() -> None:
    bench = committed_fleet(1)
    bench.start("v2")
    assert refused(bench, e.VersionDeleted(0.0, "m", "v2")) == ("FAILED_PRECONDITION", "VERSION_PINNED")
    assert refused(bench, e.VersionDeleted(0.0, "m", "v1")) == ("FAILED_PRECONDITION", "VERSION_PINNED")


def test_what_a_replica_serves_cannot_be_deleted_and_the_rest_can() -> None:
    bench = committed_fleet(1)
    bench.replica("odd", "n0", "d2")
    bench.cancel(bench.catch_ups[0].id)
    with pytest.raises(Declined, match="replica odd serves it"):
        bench.do(e.VersionDeleted(0.0, "m", "v2"))
    bench.publish("v3", "d3")
    bench.do(e.VersionDeleted(0.0, "m", "v3"))
    assert ("m", "v3") not in bench.state.versions
    assert refused(bench, e.VersionDeleted(0.0, "m", "v3")) == ("NOT_FOUND", "VERSION_UNKNOWN")


def test_nodes_are_told_to_keep_what_is_served_committed_and_under_way() -> None:
    bench = committed_fleet(2)
    bench.start("v2")
    pins = {order.member: order.action.digests for order in bench.told if isinstance(order.action, o.Pin)}
    assert pins == {"n0": {"d1", "d2"}, "n1": {"d1", "d2"}}
    bench.obey()
    pins = {order.member: order.action.digests for order in bench.told if isinstance(order.action, o.Pin)}
    assert pins == {"n0": {"d2"}, "n1": {"d2"}}


def test_pins_are_told_only_when_they_change() -> None:
    bench = committed_fleet(2)
    bench.wait(100)
    assert not [order for order in bench.told if isinstance(order.action, o.Pin)]
