"""Two live engines of one model: what one of them has otherwise than the other is committed in neither."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import ENGINE_DEADLINE_S, MODEL, REPLICA, WAIT_S, Fleet, complete, wait_for
from live_processes import answers, free_port, leave_a_core

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SECOND = "engine-2"


class Second:
    """Another engine of the fleet's model."""

    def __init__(self, fleet: Fleet, checkpoint: Path) -> None:
        self._fleet = fleet
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        fleet.start_server(SECOND, checkpoint, port, extension="misreading.Misreading", HOTWEIGHTS_REPLICA=SECOND)
        wait_for("the second engine", self._answers, ENGINE_DEADLINE_S)
        leave_a_core(fleet.pid(SECOND))

    def _answers(self) -> bool:
        assert self._fleet.runs(SECOND), (self._fleet.folder / f"{SECOND}.log").read_text()[-4000:]
        return answers(f"{self.url}/health")

    def misread(self, digest: str, tensor: str = "") -> None:
        body = json.dumps({"method": "misread", "args": [digest, tensor]}).encode()
        request = urllib.request.Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=WAIT_S).close()

    def outputs(self) -> list[str]:
        return [complete(self.url, MODEL, prompt) for prompt in self._fleet.prompts]


@pytest.fixture
def second(fleet: Fleet, checkpoints: dict[str, Path]) -> Iterator[Second]:
    try:
        engine = Second(fleet, checkpoints["v1"])
        wait_for("its replica", lambda: shown(fleet, SECOND).get("ready"))
        yield engine
    finally:
        fleet.kill(SECOND)


def shown(fleet: Fleet, replica: str) -> Any:
    return next((row for row in fleet.status()["replicas"] if row["id"] == replica), {})


def test_a_version_that_one_of_two_engines_read_wrong_serves_in_neither(
    fleet: Fleet, second: Second, oracles: dict[str, Any]
) -> None:
    versions = {version["name"]: version["manifest_digest"] for version in fleet.json("versions", "--model", MODEL)}
    second.misread(versions["v2"], "model.layers.1.mlp.down_proj.weight")
    failed = fleet.command("update", "v2", "--json")
    assert failed.returncode == 1
    update = json.loads(failed.stdout)
    assert update["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    first, _, other = update["reason"].partition(" on node ")
    assert first in (f"rank 0 of replica {REPLICA}", f"rank 0 of replica {SECOND}")
    assert "another fingerprint than replica engine-" in other
    assert {row["replica_id"]: row["outcome"] for row in update["replicas"]} == dict.fromkeys(
        (REPLICA, SECOND), "REPLICA_OUTCOME_RESTORED"
    )
    assert fleet.outputs() == second.outputs() == oracles["v1"]["outputs"]
    assert shown(fleet, REPLICA)["fingerprints"] == shown(fleet, SECOND)["fingerprints"]

    second.misread("")
    assert fleet.json("update", "v2")["phase"] == "UPDATE_PHASE_COMMITTED"
    assert fleet.outputs() == second.outputs() == oracles["v2"]["outputs"]
    assert shown(fleet, REPLICA)["fingerprints"] == shown(fleet, SECOND)["fingerprints"]
