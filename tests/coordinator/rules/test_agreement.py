"""Replicas that serve the same version have the same installed, or the update is not committed."""

from typing import Any

import pytest
from tests.coordinator.rules.bench import WINDOW, Bench
from tests.coordinator.rules.fleets import committed_fleet

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Decision, FailurePolicy, Kind, Outcome, Phase

KIND = "llama on epyc"
DIGESTS = ("d1", "d2")


def proven(count: int, **differing: str) -> Bench:
    """Replicas of one kind and two ranks on v1, all committed; rank 1 of those named has another fingerprint of v2."""
    bench = committed_fleet(count)
    bench.rank_count = 2
    for i in range(count):
        attach(bench, f"r{i}", f"n{i}", v2=differing.get(f"r{i}", "y2"))
    bench.notes.clear()
    return bench


def attach(
    bench: Bench, name: str, node: str, active: str | None = None, *, kind: str = KIND, v1: str = "y1", v2: str = "y2"
) -> None:
    bench.kinds[name] = kind
    bench.fingerprints[name, "d1"] = ("x1", v1)
    bench.fingerprints[name, "d2"] = ("x2", v2)
    bench.replica(name, node, active)


def to_v2(bench: Bench, *, applying: tuple[str, ...] = (), **options: Any) -> None:
    """Starts the update to v2; `applying` do their windows, in that order."""
    bench.start("v2", **options)
    bench.prepare_all()
    for replica in applying:
        bench.apply(replica)


def failures(bench: Bench) -> list[tuple[str, str]]:
    return [(note.replica, note.message) for note in bench.notes if note.kind is o.NoteKind.REPLICA_FAILED]


def test_an_update_whose_replicas_agree_is_committed() -> None:
    bench = proven(3)
    to_v2(bench)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED
    assert not failures(bench)


@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_two_that_disagree_are_taken_back_whatever_the_policy_and_the_rank_is_named(policy: FailurePolicy) -> None:
    bench = proven(2, r1="ODD")
    to_v2(bench, applying=("r0", "r1"), failure_policy=policy, max_failed="2")
    reason = "rank 1 of replica r1 on node n1 has another fingerprint than replica r0 for the same version"
    assert bench.update.reason == f"{reason}; either may be wrong"
    assert failures(bench) == [("r1", bench.update.reason)]
    assert (bench.phase(), bench.update.decision) == (Phase.ROLLING_BACK, Decision.ABORT)
    assert [bench.record(name).desired for name in ("r0", "r1")] == ["d1", "d1"]
    bench.obey()
    assert (bench.phase(), bench.committed) == (Phase.ROLLED_BACK, "v1")
    assert bench.active == {"r0": "d1", "r1": "d1"}
    assert not any(bench.record(name).excluded for name in ("r0", "r1"))


def test_of_three_the_one_in_the_minority_is_named() -> None:
    """r0 and r2 serve v2 already: they were started from it."""
    bench = proven(3, r1="ODD")
    for name in ("r0", "r2"):
        bench.replica(name, bench.homes[name], "d2")
    to_v2(bench, applying=("r1",), canary=3)
    reason = "rank 1 of replica r1 on node n1 has another fingerprint than replicas r0, r2 for the same version"
    assert bench.update.reason == reason
    assert failures(bench) == [("r1", reason)]


def test_the_minority_is_named_though_it_was_there_before_this_update() -> None:
    """r1 and r2 agree; what r9 was started from differs."""
    bench = proven(3)
    bench.agent("n9", "d1", "d2")
    to_v2(bench, applying=("r0", "r1"))
    attach(bench, "r9", "n9", "d2", v2="ODD")
    reason = "rank 1 of replica r9 on node n9 has another fingerprint than replicas r0, r1 for the same version"
    assert bench.update.reason == reason
    assert failures(bench) == [("r9", reason)]
    assert bench.phase() is Phase.ROLLING_BACK


def test_no_later_wave_begins_once_two_disagree() -> None:
    bench = proven(4, r1="ODD")
    to_v2(bench, max_unavailable="1")
    for replica in ("r0", "r1"):
        assert bench.going() == [replica]
        bench.apply(replica)
    gone = {order.member for order in bench.told if isinstance(order.action, o.Apply)}
    assert gone == {"r0", "r1"}
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK


def test_no_go_is_told_in_the_breath_in_which_two_that_serve_it_already_disagree() -> None:
    bench = proven(3, r1="ODD")
    for name in ("r0", "r1"):
        bench.replica(name, bench.homes[name], "d2")
    to_v2(bench, canary=3)
    assert bench.phase() is Phase.ABORTED
    assert not [order for order in bench.told if isinstance(order.action, o.Apply) and order.action.digest == "d2"]
    assert "rank 1 of replica" in bench.update.reason


def test_many_that_differ_are_counted_and_each_is_in_the_log() -> None:
    bench = proven(10, r7="ODD", r8="ODDER", r9="ODDEST")
    bench.start("v2", canary=10)
    for i in range(10):  # started anew, from v2
        bench.replica(f"r{i}", f"n{i}", "d2")
    bench.obey()
    assert bench.phase() is Phase.ABORTED
    assert bench.update.reason == (
        "rank 1 of replica r7 on node n7 has another fingerprint than replicas r0, r1, r2, r3, r4 and 2 more for the "
        "same version; 2 more differ"
    )
    assert {replica for replica, _ in failures(bench)} == {"r7", "r8", "r9"}


@pytest.mark.parametrize(
    ("kind", "fingerprints"),
    [
        ("another", ("x2", "ODD")),
        ("", ("x2", "ODD")),
        (KIND, ()),
        (KIND, ("x2",)),
        (KIND, ("x2", "y2", "z2")),
    ],
)
def test_what_cannot_be_compared_is_committed(kind: str, fingerprints: tuple[str, ...]) -> None:
    bench = proven(2)
    attach(bench, "r1", "n1", kind=kind)
    bench.fingerprints["r1", "d2"] = fingerprints
    to_v2(bench)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_two_without_a_kind_are_not_compared() -> None:
    bench = proven(2, r1="ODD")
    for name in ("r0", "r1"):
        attach(bench, name, bench.homes[name], kind="", v2=name)
    to_v2(bench)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_replicas_of_another_model_are_not_compared() -> None:
    """`other` follows another model, which has the same image."""
    bench = proven(2)
    bench.agent("n9", "d1", "d2")
    bench.kinds["other"], bench.fingerprints["other", "d2"] = KIND, ("x2", "ODD")
    bench.replica("other", "n9", "d2", model="other")
    to_v2(bench, applying=("r0",))
    bench.leaves("r0")
    bench.fingerprints["r0", "d2"] = ("x2", "ODD")
    bench.replica("r0", "n0", "d2", model="other", new_life=True)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_replicas_that_have_no_part_in_the_update_may_differ_from_each_other() -> None:
    bench = proven(2)
    bench.agent("n9", "d1", "d2")
    to_v2(bench)
    for name in ("r8", "r9"):
        attach(bench, name, "n9", "d2", kind="another", v2=name)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_who_is_out_of_contact_for_a_whole_lease_is_not_compared() -> None:
    """It was started from v2 and ended: what it had counts no more."""
    bench = proven(2)
    bench.agent("n9", "d1", "d2")
    attach(bench, "r9", "n9", "d2", v2="ODD")
    bench.leaves("r9")
    bench.wait(20)
    to_v2(bench)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED


def test_who_applied_counts_though_it_is_out_of_contact_since() -> None:
    bench = proven(2, r1="ODD")
    to_v2(bench, applying=("r0",))
    bench.leaves("r0")
    bench.wait(20)
    bench.apply("r1")
    assert bench.phase() is Phase.ROLLING_BACK
    assert "rank 1 of replica r1" in bench.update.reason


def test_a_catch_up_that_differs_is_taken_back_and_left_alone_after_three() -> None:
    bench = proven(2)
    to_v2(bench)
    bench.obey()
    bench.agent("n9", "d1", "d2")
    attach(bench, "late", "n9", "d1", v2="ODD")
    bench.obey()
    (first,) = bench.catch_ups
    reason = "rank 1 of replica late on node n9 has another fingerprint than replicas r0, r1 for the same version"
    assert (first.phase, first.reason, bench.active["late"]) == (Phase.ROLLED_BACK, reason, "d1")
    assert failures(bench) == [("late", reason)]
    for _ in range(10):
        bench.wait(10)
        bench.obey()
    assert [update.phase for update in bench.catch_ups] == 3 * [Phase.ROLLED_BACK]
    assert bench.record("late").excluded
    assert bench.committed == "v2"


def test_a_catch_up_that_agrees_is_committed() -> None:
    bench = proven(2)
    to_v2(bench)
    bench.obey()
    bench.agent("n9", "d1", "d2")
    attach(bench, "late", "n9", "d1")
    bench.obey()
    assert [update.phase for update in bench.catch_ups] == [Phase.COMMITTED]


def test_a_rollback_is_compared_as_any_update() -> None:
    bench = proven(2)
    to_v2(bench)
    bench.obey()
    bench.fingerprints["r1", "d1"] = ("ODD", "y1")
    bench.start("", Kind.ROLLBACK)
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.update.reason.startswith("rank 0 of replica r1 on node n1 has another fingerprint than replica r0")


def test_a_restored_replica_that_differs_has_diverged_and_the_update_ends() -> None:
    bench = proven(3)
    to_v2(bench, applying=("r0", "r1"))
    bench.fingerprints["r1", "d1"] = ("x1", "ODD")
    bench.fail("r2", "shapes differ")
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK
    assert bench.outcomes() == {"r0": Outcome.RESTORED, "r1": Outcome.DIVERGED, "r2": Outcome.RESTORED}
    reason = "rank 1 of replica r1 on node n1 has another fingerprint than replicas r0, r2 for the same version"
    assert bench.update.members["r1"].reason == reason
    assert ("r1", reason) in failures(bench)
    assert bench.update.reason == "replica r2: shapes differ"


def test_restored_replicas_that_agree_are_restored() -> None:
    bench = proven(2)
    to_v2(bench, applying=("r0",))
    bench.cancel(bench.update.id)
    bench.obey()
    assert set(bench.outcomes().values()) == {Outcome.RESTORED}
    assert not failures(bench)


def test_copies_of_what_has_no_digest_are_compared_with_nothing() -> None:
    bench = proven(2)
    for name, odd in (("r0", "p"), ("r1", "q")):
        bench.fingerprints[name, ""] = (odd, odd)
        bench.replica(name, bench.homes[name], "")
    to_v2(bench, applying=("r0",))
    bench.cancel(bench.update.id)
    bench.obey()
    assert set(bench.outcomes().values()) == {Outcome.RESTORED}


# Other leaders.


def test_a_leader_that_heard_only_one_of_two_compares_them_from_their_hellos() -> None:
    bench = proven(2, r1="ODD")
    to_v2(bench, applying=("r0",))
    bench.active["r1"] = "d2"  # applied; its report is lost with the leader
    bench.lead_anew()
    assert bench.phase() is Phase.ROLLING_BACK
    assert "rank 1 of replica r1 on node n1" in bench.update.reason
    bench.obey()
    assert bench.phase() is Phase.ROLLED_BACK


def between_reports(**differing: str) -> Bench:
    """r0 applied; r1 has GO; then another leader, to which only r1 has said Hello, and which it reports to."""
    bench = proven(2, **differing)
    to_v2(bench, applying=("r0",))
    go, _ = bench.take(o.Apply, "r1")
    bench.lead_anew(attached=False)
    for node in ("n0", "n1"):
        bench.agent(node, *bench.held[node])
    bench.replica("r1", "n1", open_window=bench.update.id)
    bench.active["r1"] = "d2"
    proof = bench.fingerprints["r1", "d2"]
    bench.do(e.Applied(*bench.who("r1"), go.update, go.ticket, "d2", WINDOW, proof))
    return bench


def test_a_new_leader_commits_nothing_before_it_has_heard_of_all_that_applied() -> None:
    bench = between_reports(r1="ODD")
    assert (bench.phase(), bench.update.decision) == (Phase.APPLYING, Decision.NONE)
    bench.replica("r0", "n0")
    assert (bench.phase(), bench.update.decision) == (Phase.ROLLING_BACK, Decision.ABORT)
    assert "rank 1 of replica r1" in bench.update.reason


def test_a_new_leader_commits_when_the_last_that_applied_says_hello_and_agrees() -> None:
    bench = between_reports()
    assert bench.phase() is Phase.APPLYING
    bench.replica("r0", "n0")
    assert bench.phase() is Phase.COMMITTED


def test_a_new_leader_waits_no_longer_than_a_lease_for_who_applied() -> None:
    bench = between_reports()
    bench.wait(10)
    assert bench.phase() is Phase.APPLYING
    bench.wait(10)
    assert bench.phase() is Phase.COMMITTED


# Fingerprints are of what is served now.


def test_fingerprints_of_before_are_not_taken_for_those_of_what_is_served_now() -> None:
    """A failure that leaves another version and a folder that was identified come without any."""
    for report in ("failed", "changed"):
        bench = proven(2)
        to_v2(bench, applying=("r0",))
        go, _ = bench.waiting(o.Apply, "r1")[0]
        if report == "failed":
            bench.do(e.ApplyFailed(*bench.who("r1"), go.update, go.ticket, "odd", "d2"))
        else:
            bench.do(e.ActiveChanged(*bench.who("r1"), "d2"))
        seat = bench.state.seats["r1"]
        assert (report, seat.active, seat.fingerprints) == (report, "d2", ())


@pytest.mark.parametrize("fingerprints", [(), ("x2", "y2")])
def test_a_late_report_brings_its_own_fingerprints(fingerprints: tuple[str, ...]) -> None:
    bench = proven(2)
    to_v2(bench, applying=("r0",))
    go, _ = bench.take(o.Apply, "r1")
    bench.wait(900)
    bench.take(o.Apply, "r1")
    bench.obey()
    assert not bench.phase().is_open
    bench.do(e.Applied(*bench.who("r1"), go.update, go.ticket, "d2", WINDOW, fingerprints))
    seat = bench.state.seats["r1"]
    assert (seat.active, seat.fingerprints) == ("d2", fingerprints)


def test_a_failure_that_left_the_version_of_before_leaves_its_fingerprints() -> None:
    bench = proven(2)
    to_v2(bench, applying=("r0",))
    bench.fail("r1")
    assert bench.state.seats["r1"].fingerprints == ("x1", "y1")


def test_a_replica_is_not_compared_with_what_it_was_itself() -> None:
    """It restarted and says other fingerprints for the same version; nobody else serves it."""
    bench = proven(1)
    to_v2(bench)
    bench.obey()
    bench.fingerprints["r0", "d2"] = ("x2", "ODD")
    bench.leaves("r0")
    bench.replica("r0", "n0", "d2", new_life=True)
    bench.start("", Kind.ROLLBACK)
    bench.obey()
    assert bench.phase() is Phase.COMMITTED
