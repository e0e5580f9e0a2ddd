"""Faults of the engine and of the controller in its front end: most end a server, which takes a minute to start."""

import itertools
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import Watch, assert_ended, ended, killed_at_write, serves, started
from fleet import ENGINE_DEADLINE_S, REPLICA, WAIT_S, Fleet, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.matrix, pytest.mark.timeout(1500, func_only=True)]

SHORT = ("--quiesce-deadline", "5", "--apply-deadline", "6")
LONGER = ("--quiesce-deadline", "5", "--apply-deadline", "25")  # time to be killed in it
# A GO that nobody reports on: its validity, the pause, the apply twice, the margin; then the way back for a lease.
UPDATE_DEADLINE_S = 150.0
SERVER_ENDS_S = 90.0


@pytest.fixture
def on_v2(fleet: Fleet) -> Fleet:
    """Committed to v2, while a server that starts again starts from v1's folder: it has to catch up."""
    assert_ended(fleet.json("update", "v2"), "COMMITTED")
    return fleet


def core_pid(fleet: Fleet) -> int:
    """The engine core's process: with one rank, the rank's."""
    (rank,) = fleet.replica()["ranks"]
    pid: int = rank["pid"]
    return pid


def is_gone(pid: int) -> bool:
    """Ended, whether or not somebody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def starts_again(fleet: Fleet, oracles: dict[str, Any]) -> None:
    """What a supervisor does; and the replica comes to the committed version by itself."""
    fleet.start_engine()
    serves_v2(fleet, ENGINE_DEADLINE_S)
    serves(fleet, "v2", oracles["v2"])


def serves_v2(fleet: Fleet, deadline_s: float = WAIT_S) -> None:
    def ready() -> bool:
        replica = fleet.replica()
        return bool(replica.get("ready") and replica["active_version"] == "v2")

    wait_for("v2", ready, deadline_s)


def hanging(fleet: Fleet, watch: Watch, key: str, hangs: str, at: str) -> str:
    """The update to v1 that hangs in the engine; from here on the fault is watched."""
    watch.about(key)
    fleet.inject(hangs)
    update_id = started(fleet, "v1", *LONGER)
    fleet.wait_for_phase(update_id, at)
    time.sleep(0.5)  # into the hang
    watch.fault()
    return update_id


def ends_by_the_replica(fleet: Fleet, update_id: str, phase: str) -> None:
    update = ended(fleet, update_id, UPDATE_DEADLINE_S)
    assert_ended(update, phase)
    (member,) = update["replicas"]
    assert member["replica_id"] == REPLICA
    assert member["reason"]
    assert REPLICA in update["reason"]


@pytest.mark.parametrize(
    ("key", "hangs", "at", "ends"),
    [
        ("engine-killed-staging", "prepare.start:hang=60", "STAGING", "ABORTED"),
        ("engine-killed-applying", "apply.start:hang=60", "APPLYING", "ROLLED_BACK"),
    ],
)
def test_an_engine_core_that_is_killed_ends_its_server_and_the_update(
    on_v2: Fleet, oracles: dict[str, Any], watch: Watch, key: str, hangs: str, at: str, ends: str
) -> None:
    fleet = on_v2
    core = core_pid(fleet)
    update_id = hanging(fleet, watch, key, hangs, at)
    os.kill(core, signal.SIGKILL)
    fleet.await_end("engine", SERVER_ENDS_S)
    ends_by_the_replica(fleet, update_id, ends)
    starts_again(fleet, oracles)
    watch.ended(f"server ended, {ends}, restarted on v2", requests_may_fail=True)


@pytest.mark.parametrize(
    ("key", "hangs", "at", "ends"),
    [
        ("controller-killed-staging", "prepare.start:hang=60", "STAGING", "ABORTED"),
        ("controller-killed-applying", "apply.start:hang=60", "APPLYING", "ROLLED_BACK"),
    ],
)
def test_a_front_end_that_is_killed_takes_its_engine_along_and_ends_the_update(
    on_v2: Fleet, oracles: dict[str, Any], watch: Watch, key: str, hangs: str, at: str, ends: str
) -> None:
    fleet = on_v2
    core = core_pid(fleet)
    update_id = hanging(fleet, watch, key, hangs, at)
    fleet.send("engine", signal.SIGKILL)
    assert fleet.await_end("engine") == -signal.SIGKILL
    wait_for("the end of the engine core", lambda: is_gone(core), SERVER_ENDS_S)
    ends_by_the_replica(fleet, update_id, ends)
    starts_again(fleet, oracles)
    watch.ended(f"engine core ended, {ends}, restarted on v2", requests_may_fail=True)


def test_a_controller_that_ends_by_a_bug_in_the_pause_leaves_no_engine_paused(
    on_v2: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    fleet = on_v2
    watch.about("controller-fails-in-pause")
    fleet.fail_at("window.paused:raise")
    watch.fault()
    update_id = started(fleet, "v1", *SHORT)
    fleet.await_end("engine", SERVER_ENDS_S)
    ends_by_the_replica(fleet, update_id, "ROLLED_BACK")
    fleet.fail_at("")
    starts_again(fleet, oracles)
    watch.ended("engine and server ended, ROLLED_BACK, restarted on v2", requests_may_fail=True)


def test_an_engine_core_that_stops_in_the_pause_is_torn_and_ended(
    on_v2: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    fleet = on_v2
    watch.about("engine-stopped")
    fleet.inject("apply.start:stop")
    core = core_pid(fleet)
    watch.fault()
    update_id = started(fleet, "v1", *SHORT)
    fleet.await_end("engine", SERVER_ENDS_S)
    assert is_gone(core), "a process that is stopped is ended all the same"
    assert "TORN: hotweights_apply did not answer within 6 s" in (fleet.folder / "engine.log").read_text()
    ends_by_the_replica(fleet, update_id, "ROLLED_BACK")
    starts_again(fleet, oracles)
    watch.ended("torn, server ended, ROLLED_BACK, restarted on v2", requests_may_fail=True)


def test_a_front_end_that_stops_in_the_pause_is_left_behind_and_catches_up(
    on_v2: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    fleet = on_v2
    watch.about("controller-stopped")
    fleet.fail_at("window.paused:stop")
    update_id = started(fleet, "v1", *SHORT)
    fleet.await_stop("engine")
    watch.fault()
    fleet.fail_at("")
    ends_by_the_replica(fleet, update_id, "ROLLED_BACK")
    fleet.send("engine", signal.SIGCONT)
    serves_v2(fleet)
    serves(fleet, "v2", oracles["v2"])
    watch.ended("ROLLED_BACK, diverged; continued it came back to v2", requests_may_fail=True)


@pytest.mark.timeout(3600, func_only=True)
def test_a_coordinator_killed_before_and_after_each_durable_write_of_an_update(
    fleet: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    watch.about("coordinator-killed-at-write")
    old, new, outcomes = "v1", "v2", Counter[str]()
    for when in ("before", "after"):
        for number in itertools.count(1):
            assert number < 50, "an update makes fewer writes than that"
            outcome = killed_at_write(fleet, oracles, watch, f"store.save.{when}={number}", old=old, new=new)
            if outcome in ("", "COMMITTED"):
                old, new = new, old
            if not outcome:
                break
            outcomes[outcome] += 1
    assert outcomes["COMMITTED"], "not one was gone on with"
    counts = ", ".join(f"{count} times {outcome}" for outcome, count in sorted(outcomes.items()))
    watch.ended(f"{outcomes.total()} kills: {counts}")
