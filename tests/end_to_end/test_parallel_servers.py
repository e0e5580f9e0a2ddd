"""Two data parallel engines behind two API servers: one replica, all of it or nothing.

A server and its processes of their own; the last test tears it.
"""

import importlib.util
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import ENGINE_DEADLINE_S, MODEL, REPLICA, WAIT_S, Fleet, wait_for
from oracle import MAX_TOKENS
from tests.faults_recorder import FaultRow

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("data parallel 2"),
    pytest.mark.capability("--api-server-count 2"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


class ParallelFleet(Fleet):
    """As Fleet, with two engines behind two API servers."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        super().__init__(folder, checkpoint)
        self.stage = self.stage.with_name(f"{self.stage.name}-parallel")
        self.environment |= {
            "HOTWEIGHTS_STAGE_DIR": str(self.stage),
            "HOTWEIGHTS_AGENT_SOCKET": str(self.stage / "agent.sock"),
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        }

    def start_engine(self) -> None:
        options = ("--data-parallel-size", "2", "--api-server-count", "2")
        self.start_server("engine", self.checkpoint, self.api_port, *options)
        wait_for("the engine", self._engine_answers, ENGINE_DEADLINE_S)
        wait_for("the replica", lambda: self.replica().get("active_digest"))

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return json.loads(response.read() or b"null")

    def outputs_of(self, engine: int) -> list[str]:
        """Of one engine; which API server answers is the kernel's choice at each connection."""
        body = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        return [
            self.post("/v1/completions", {**body, "prompt": prompt}, **{"X-data-parallel-rank": str(engine)})[
                "choices"
            ][0]["text"]
            for prompt in self.prompts
        ]

    def serve(self, outputs: list[str]) -> bool:
        return all(self.outputs_of(engine) == outputs for engine in (0, 1))

    def inject_in(self, engine: int, failpoints: str) -> None:
        self.post("/collective_rpc", {"method": "inject_failpoints", "args": [failpoints, engine]})


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], oracles: dict[str, Any]
) -> Iterator[ParallelFleet]:
    fleet = ParallelFleet(tmp_path_factory.mktemp("parallel"), checkpoints["v1"])
    fleet.prompts = oracles["v1"]["prompts"]
    try:
        fleet.start_all(checkpoints)
        yield fleet
    finally:
        fleet.close()
        shutil.rmtree(fleet.stage, ignore_errors=True)


def test_all_engines_of_a_server_form_one_replica(fleet: ParallelFleet) -> None:
    (replica,) = fleet.status()["replicas"]
    assert replica["id"] == REPLICA
    assert [rank.get("index", 0) for rank in replica["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in replica["ranks"]}) == 2
    assert len(replica["fingerprints"]) == 2


def test_a_swap_reaches_every_engine_behind_every_api_server_and_so_does_the_way_back(
    fleet: ParallelFleet, oracles: dict[str, Any]
) -> None:
    assert fleet.serve(oracles["v1"]["outputs"])
    assert fleet.json("update", "v2")["phase"] == "UPDATE_PHASE_COMMITTED"
    assert fleet.serve(oracles["v2"]["outputs"])
    assert fleet.json("rollback")["phase"] == "UPDATE_PHASE_COMMITTED"
    assert fleet.serve(oracles["v1"]["outputs"])


@pytest.mark.parametrize("engine", [0, 1])
def test_a_failure_in_one_engine_takes_both_back(fleet: ParallelFleet, oracles: dict[str, Any], engine: int) -> None:
    fleet.inject_in(engine, "apply.tensor=3:raise")
    failed = fleet.command("update", "v2", "--json")
    fleet.inject_in(engine, "")
    assert failed.returncode != 0
    update = json.loads(failed.stdout)
    assert update["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert f"rank {engine}: Injected" in update["reason"]
    assert f"rank {1 - engine}" not in update["reason"]
    assert fleet.serve(oracles["v1"]["outputs"])


@pytest.mark.capability("engine asleep")
def test_a_sleep_asked_of_any_api_server_is_respected(fleet: ParallelFleet, oracles: dict[str, Any]) -> None:
    fleet.post("/sleep?level=1", {})
    update = json.loads(fleet.command("update", "v2", "--no-wait", "--json").stdout)
    deferred = wait_for("a deferred window", lambda: _reason(fleet, update["id"]))
    assert "asleep at level 1" in deferred
    fleet.post("/wake_up", {})
    fleet.wait_for_phase(update["id"], "COMMITTED")
    assert fleet.serve(oracles["v2"]["outputs"])
    assert fleet.json("update", "v1")["phase"] == "UPDATE_PHASE_COMMITTED"


def _reason(fleet: Fleet, update_id: str) -> str:
    update = next(u for u in fleet.status()["updates"] if u["id"] == update_id)
    return str(update["replicas"][0].get("reason", ""))


def test_an_engine_in_doubt_ends_its_server_with_the_reason_in_its_log(fleet: ParallelFleet) -> None:
    """No process of the server knows the engines' manager here: they are ended by the ids they gave."""
    (replica,) = fleet.status()["replicas"]
    said = log_bytes(fleet)
    fleet.inject_in(1, "apply.start:hang=120")
    failed = fleet.command("update", "v2", "--apply-deadline", "2", "--json")
    assert json.loads(failed.stdout)["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert json.loads(failed.stdout)["replicas"][0]["outcome"] == "REPLICA_OUTCOME_TORN"
    check_server_ended(fleet, replica, said)


@pytest.mark.matrix
def test_a_rank_killed_in_the_pause_ends_its_server_and_a_new_one_catches_up(
    fleet: ParallelFleet, oracles: dict[str, Any], fault_row: FaultRow
) -> None:
    fault_row.about("rank-killed-in-pause")
    if not fleet.runs("engine"):
        fleet.start_engine()
    assert fleet.json("update", "v2")["phase"] == "UPDATE_PHASE_COMMITTED"
    (replica,) = fleet.status()["replicas"]
    said = log_bytes(fleet)
    fleet.inject_in(1, "apply.tensor=3:kill")
    begun = time.monotonic()
    update = json.loads(fleet.command("update", "v1", "--apply-deadline", "10", "--json").stdout)
    assert update["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert update["replicas"][0]["outcome"] == "REPLICA_OUTCOME_TORN"
    assert REPLICA in update["reason"]
    check_server_ended(fleet, replica, said)
    fleet.start_engine()  # on v1's folder, as a supervisor does
    wait_for("v2", lambda: fleet.replica().get("ready") and fleet.serve(oracles["v2"]["outputs"]))
    fault_row.ended("torn, server ended, ROLLED_BACK, restarted on v2", recover_s=time.monotonic() - begun)


def log_bytes(fleet: Fleet) -> int:
    return (fleet.folder / "engine.log").stat().st_size


def check_server_ended(fleet: Fleet, replica: Any, said: int) -> None:
    """By itself, all ranks of it, and it says why after the bytes that it had said before."""
    server = fleet.process("engine")
    wait_for("the end of the server", lambda: server.poll() is not None)
    assert b"TORN: " in (fleet.folder / "engine.log").read_bytes()[said:]
    ends = time.monotonic() + WAIT_S
    while any(_runs(rank["pid"]) for rank in replica["ranks"]) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not [rank for rank in replica["ranks"] if _runs(rank["pid"])]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
