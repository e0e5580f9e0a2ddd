"""Updates seen through the command line, with a replica that has no engine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import DEADLINE_S, Serving
from .stand_in import StandIn


@pytest.fixture(scope="module")
def replica(agent: Serving, checkpoints: dict[str, Path]) -> Iterator[StandIn]:
    """It serves v1; v1 and v2 are published."""
    digests = [
        agent.json("publish", str(checkpoints[name]), "--model", "m", "--version", name)["manifest_digest"]
        for name in ("v1", "v2")
    ]
    with StandIn(agent.endpoint, "m", digests[0]) as replica:
        yield replica


def test_a_plan_says_bytes_buckets_sources_and_waves(agent: Serving, replica: StandIn) -> None:
    said = agent.text("plan", "v2")
    assert "m: from v1 to v2: 0 B in 0 buckets to 1 node" in said
    assert "here  0 B    0        0 B        has it" in said
    assert any(line.split() == ["1", "1", "stand-in"] for line in said.splitlines())
    assert agent.json("plan", "v2")["waves"] == [{"replica_ids": ["stand-in"]}]


def test_an_update_that_fails_is_exit_code_1_with_the_reason(agent: Serving, replica: StandIn) -> None:
    replica.breaks = "the third tensor refused"
    done = agent.run("update", "v2", "--canary", "1", "--apply-deadline", "5")
    replica.breaks = ""
    assert done.returncode == 1
    assert "the third tensor refused" in done.stderr
    assert "update m.1 to v2 was" in done.stderr
    assert "the third tensor refused" in agent.text("coord-status")


def test_a_version_that_does_not_fit_is_told_everywhere_by_tensor_and_what_differs(
    agent: Serving, replica: StandIn
) -> None:
    differs = "first norm.weight in shape: BF16[64] in the image, BF16[32] in the model"
    why = f"rank 1: Mismatch: 1 tensor is of another shape or dtype, {differs}"
    replica.misfit = why
    done = agent.run("update", "v2")
    replica.misfit = ""
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"was aborted: replica stand-in: {why}")
    assert agent.json("coord-status")["updates"][-1]["reason"] == f"replica stand-in: {why}"
    assert why in agent.text("coord-status")
    assert why in agent.text("events", "--last", "5")


def test_a_check_for_finite_values_is_ordered_shown_and_only_on_the_way_forward(
    agent: Serving, replica: StandIn
) -> None:
    assert "note: every rank looks for NaN and infinite values" in agent.text("plan", "v2", "--check-finite")
    assert "NaN" not in agent.text("plan", "v2")
    replica.breaks = "not now"
    for arguments, checked in ((("--check-finite",), True), ((), False)):
        assert agent.run("update", "v2", *arguments).returncode == 1
        assert replica.checked is checked
        assert agent.json("coord-status")["updates"][-1]["options"]["check_finite"] is checked
        assert (", values checked (--check-finite)" in agent.text("coord-status")) is checked
    replica.breaks = ""
    assert agent.run("rollback", "--check-finite").returncode == 2


def test_an_update_is_waited_for_and_0_when_it_was_committed(agent: Serving, replica: StandIn) -> None:
    said = agent.text("update", "v2")
    assert "fleet update of m from v1 to v2, 1 replica on 1 node" in said
    assert "stand-in applied, pause 6.0 ms (quiesce 1.0, apply 2.0, resume 3.0)" in said
    assert "committed to v2 after" in said.splitlines()[-1]


def test_status_shows_the_replica_its_pause_and_the_commit(agent: Serving, replica: StandIn) -> None:
    status = agent.json("coord-status")
    (shown,) = status["replicas"]
    assert shown["ready"] is True
    assert (shown["active_version"], shown["fingerprints"]) == ("v2", ["0102"])
    assert shown["last_window"]["apply_ms"] == 2.0
    assert status["models"][0]["committed_version"] == "v2"
    row = "stand-in  m      ready  v2       v2      1      6.0 ms (quiesce 1.0, apply 2.0, resume 3.0)  stand-in 1"
    assert row in agent.text("coord-status")


def test_status_shows_how_the_replica_is_written_and_with_whom_it_is_compared(agent: Serving, replica: StandIn) -> None:
    (shown,) = agent.json("coord-status")["replicas"]
    assert shown["fingerprint_kind"] == "stand-ins"
    assert shown["routes"] == {
        **{"direct_modules": 214, "direct_bytes": 886_000_000, "assembled_modules": 0, "assembled_bytes": 0},
        **{"reload_modules": 2, "reload_bytes": 12_000_000},
        "reasons": ["model.layers.0.mlp.experts: repacked after loading"],
        "sources": ["cuda-ipc: 844 MiB of GPU-1 of another process"],
    }
    line = (
        "stand-in  direct 214 modules 886.0 MB · reload 2 modules 12.0 MB "
        "(model.layers.0.mlp.experts: repacked after loading); from cuda-ipc: 844 MiB of GPU-1 of another process"
    )
    assert line in agent.text("coord-status")


def test_a_committed_version_is_not_started_again_and_cannot_be_cancelled(agent: Serving, replica: StandIn) -> None:
    assert "committed to v2 already" in agent.refusal("update", "v2")
    update = agent.json("coord-status")["updates"][-1]
    assert update["phase"] == "UPDATE_PHASE_COMMITTED"
    assert agent.refusal("cancel", update["id"]) != ""


def test_a_rollback_goes_back_and_holds_the_model_until_resume(agent: Serving, replica: StandIn) -> None:
    update = agent.json("rollback")
    assert (update["phase"], update["target_version"]) == ("UPDATE_PHASE_COMMITTED", "v1")
    assert update["kind"] == "UPDATE_KIND_ROLLBACK"
    assert agent.json("coord-status")["models"][0]["held"] is True
    assert agent.text("resume") == "m: no longer held, policy manual\n"


def test_a_publication_with_update_and_wait_ends_with_the_commit(
    agent: Serving, replica: StandIn, checkpoints: dict[str, Path]
) -> None:
    done = agent.json("publish", str(checkpoints["v3"]), "--version", "v3", "--update", "--wait", "--check-finite")
    assert done["version"]["name"] == "v3"
    assert done["update"]["phase"] == "UPDATE_PHASE_COMMITTED"
    assert done["update"]["options"]["check_finite"] is True
    assert replica.checked


def test_an_update_that_is_not_waited_for_is_only_named(agent: Serving, replica: StandIn) -> None:
    update = agent.json("update", "v2", "--no-wait")
    assert update["target_version"] == "v2"
    followed = agent.text("events", "--last", "5")
    assert update["id"] in followed


# Also where these tests run in the background of a shell, whose processes ignore it.
HEARS_SIGINT = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("hotweights.cli", run_name="__main__", alter_sys=True)
"""


def test_events_are_followed_over_a_filter_until_the_reader_goes(agent: Serving, replica: StandIn) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_SIGINT, "events", "--from", "1", "--follow", "--model", "m", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=agent.node.environment(HOTWEIGHTS_ENDPOINT=agent.endpoint),
    )
    assert process.stdout is not None
    events = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [event["model"] for event in events] == ["m", "m", "m"]
    assert events[0]["kind"] == "EVENT_KIND_VERSION_PUBLISHED"
    agent.text("policy", "m", "manual")
    while json.loads(process.stdout.readline())["kind"] != "EVENT_KIND_MODEL_POLICY":
        pass
    process.send_signal(2)
    assert process.wait(DEADLINE_S) == 130
    process.stdout.close()


def test_undrain_names_the_replica(agent: Serving, replica: StandIn) -> None:
    assert agent.text("undrain", "stand-in").startswith("stand-in: no longer excluded")
    assert "there is no replica 'x'" in agent.refusal("undrain", "x")


def test_an_update_that_is_followed_ends_with_the_commit(agent: Serving, replica: StandIn) -> None:
    agent.json("update", "v1", "--wait")
    assert agent.json("update", "v2", "--follow")["phase"] == "UPDATE_PHASE_COMMITTED"
