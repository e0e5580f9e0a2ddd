"""The whole way of the data on a live vLLM server: swap, failure, rollback, and parts killed on the way."""

import json
import subprocess
import time
from typing import Any

import pytest
from fleet import MODEL, Fleet, wait_for
from live_traffic import Traffic

pytestmark = [pytest.mark.vllm, pytest.mark.capability("OpenAI server"), pytest.mark.timeout(400)]


def started(fleet: Fleet, version: str) -> str:
    """The id of an update that was begun and not waited for."""
    update_id: str = fleet.json("update", version, "--no-wait")["id"]
    return update_id


def serves(fleet: Fleet, version: str, oracles: dict[str, Any]) -> None:
    """Outputs, live parameters and status all are the version's."""
    assert fleet.outputs() == oracles[version]["outputs"]
    replica = fleet.replica()
    assert replica["fingerprints"] == oracles[version]["fingerprints"]
    assert replica["active_version"] == version
    assert replica["desired_version"] == version
    assert replica["ready"]


@pytest.mark.capability("a worker extension of the user's own")
def test_a_version_is_swapped_in_and_rolled_back_while_clients_stream(fleet: Fleet, oracles: dict[str, Any]) -> None:
    traffic = Traffic(f"{fleet.url}/v1", MODEL, clients=3)
    traffic.start()
    wait_for("traffic", lambda: traffic.seen.token_times)
    begun = time.monotonic()
    update = fleet.json("update", "v2")
    assert update["phase"] == "UPDATE_PHASE_COMMITTED"
    served = traffic.seen.tokens_between(begun, time.monotonic())
    serves(fleet, "v2", oracles)
    window = update["replicas"][0]["window"]
    assert min(window["quiesce_ms"], window["apply_ms"], window["resume_ms"]) > 0

    update = fleet.json("rollback")
    assert update["phase"] == "UPDATE_PHASE_COMMITTED"
    serves(fleet, "v1", oracles)
    traffic.stop()
    assert traffic.seen.failures == []
    assert served > 0


@pytest.mark.parametrize("place", ["apply.start", "apply.tensor=1", "apply.tensor=6", "apply.tensor=11", "apply.end"])
def test_a_failed_apply_leaves_the_old_version_serving(fleet: Fleet, oracles: dict[str, Any], place: str) -> None:
    fleet.inject(f"{place}:raise")
    done = fleet.command("update", "v2")
    assert done.returncode == 1
    assert place in done.stderr + done.stdout
    update = fleet.last_update()
    assert update["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert f"failpoint {place}" in update["reason"]
    assert any(place in event["message"] for event in fleet.status()["events"])
    serves(fleet, "v1", oracles)

    fleet.inject("")
    assert fleet.json("update", "v2")["phase"] == "UPDATE_PHASE_COMMITTED"
    serves(fleet, "v2", oracles)


def test_a_coordinator_killed_while_staging_goes_on_with_the_update(fleet: Fleet, oracles: dict[str, Any]) -> None:
    fleet.inject("prepare.start:hang=8")
    update_id = started(fleet, "v2")
    fleet.wait_for_phase(update_id, "STAGING")
    fleet.kill("coordinator")
    fleet.start_coordinator()
    fleet.wait_for_phase(update_id, "COMMITTED")
    serves(fleet, "v2", oracles)


def test_a_coordinator_killed_while_applying_learns_what_became_of_it(fleet: Fleet, oracles: dict[str, Any]) -> None:
    fleet.inject("apply.start:hang=8")
    update_id = started(fleet, "v2")
    fleet.wait_for_phase(update_id, "APPLYING")
    fleet.kill("coordinator")
    fleet.start_coordinator()
    wait_for("the end of the update", lambda: fleet.last_update().get("ended_at"))
    update = fleet.last_update()
    replica = fleet.replica()
    assert replica["active_version"] == replica["desired_version"]
    assert (update["phase"], replica["active_version"]) in (
        ("UPDATE_PHASE_COMMITTED", "v2"),
        ("UPDATE_PHASE_ROLLED_BACK", "v1"),
    )
    serves(fleet, replica["active_version"], oracles)


def test_an_agent_killed_while_staging_comes_back_and_the_update_goes_on(fleet: Fleet, oracles: dict[str, Any]) -> None:
    fleet.inject("prepare.start:hang=6")
    update_id = started(fleet, "v2")
    fleet.wait_for_phase(update_id, "STAGING")
    fleet.kill("agent")
    fleet.start_agent()
    fleet.wait_for_phase(update_id, "COMMITTED")
    serves(fleet, "v2", oracles)


def test_cancelling_while_staging_aborts_and_nothing_was_touched(fleet: Fleet, oracles: dict[str, Any]) -> None:
    fleet.inject("prepare.start:hang=6")
    update_id = started(fleet, "v2")
    cancelled = fleet.json("cancel", update_id)
    assert cancelled["phase"] == "UPDATE_PHASE_ABORTED"
    serves(fleet, "v1", oracles)


def test_a_client_that_is_not_ours_lists_services_and_reads_status_and_health(fleet: Fleet) -> None:
    address = f"http://127.0.0.1:{fleet.coordinator_port}"
    curl = [".venv-tools/bin/buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]

    def ask(*arguments: str) -> str:
        done = subprocess.run([*curl, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    services = ask("--list-services", address)
    assert "hotweights.v1.CoordinatorService" in services
    status = json.loads(ask("-d", "{}", f"{address}/hotweights.v1.CoordinatorService/GetStatus"))
    assert MODEL in [model["name"] for model in status["models"]]
    health = json.loads(ask("-d", "{}", f"{address}/grpc.health.v1.Health/Check"))
    assert health == {"status": "SERVING"}


def test_auto_follows_the_newest_version_and_a_rollback_holds_it(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Any]
) -> None:
    def serving(version: str) -> bool:
        replica = fleet.replica()
        return bool(replica["active_version"] == version and replica["ready"])

    fleet.json("resume")  # the rollbacks of the tests before hold the model
    fleet.json("publish", str(checkpoints["v2"]), "--model", MODEL, "--version", "newest")
    fleet.json("policy", MODEL, "auto")
    try:
        wait_for("the newest version", lambda: serving("newest"))
        fleet.json("publish", str(checkpoints["v1"]), "--model", MODEL, "--version", "v3")
        wait_for("v3, just published", lambda: serving("v3"))
        assert fleet.outputs() == oracles["v1"]["outputs"]
        assert fleet.json("rollback")["phase"] == "UPDATE_PHASE_COMMITTED"
        time.sleep(2.0)
        serves(fleet, "newest", {**oracles, "newest": oracles["v2"]})
        fleet.json("resume")
        wait_for("v3 once more", lambda: serving("v3"))
    finally:
        fleet.json("policy", MODEL, "manual")
