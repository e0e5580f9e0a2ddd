"""Two models on one coordinator, several engines on one node: one agent, one staged copy each, nobody disturbed.

One engine is real; beside it are replicas whose engine is not, with the real controller, session and agent. The
test at the end, too long for CI, has three real ones.
"""

import functools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import ENGINE_DEADLINE_S, MODEL, REPLICA, Fleet, complete, wait_for
from growth import folder_mib
from live_processes import answers, free_port, leave_a_core
from random_llama import make_checkpoint
from stand_in_replicas import StandInReplica
from tests.worker_client.window.fakes import refuses

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

OTHER = "other"


@pytest.fixture(scope="module")
def others(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions of the other model; o2 is, byte for byte, v2 of the first."""
    root = tmp_path_factory.mktemp("others")
    made = {name: make_checkpoint(root / name, seed, "small") for name, seed in (("o1", 11), ("o3", 13))}
    return {"o1": made["o1"], "o2": checkpoints["v2"], "o3": made["o3"]}


@pytest.fixture(scope="module")
def published(running: Fleet, others: dict[str, Path]) -> dict[str, str]:
    """Digests of all versions of both models."""
    for name, folder in others.items():
        running.json("publish", str(folder), "--model", OTHER, "--version", name)
    versions = [v for model in (MODEL, OTHER) for v in running.json("versions", "--model", model)]
    return {version["name"]: version["manifest_digest"] for version in versions}


@pytest.fixture
def second(fleet: Fleet, checkpoints: dict[str, Path]) -> Iterator[StandInReplica]:
    """Another engine of the first model."""
    with StandInReplica(fleet, "engine-2", MODEL, checkpoints["v1"]) as replica:
        yield replica


@pytest.fixture
def other(fleet: Fleet, published: dict[str, str], others: dict[str, Path]) -> Iterator[StandInReplica]:
    """An engine of the other model, committed to o1."""
    with StandInReplica(fleet, "other-1", OTHER, others["o1"]) as replica:
        committed = next(m for m in fleet.status()["models"] if m["name"] == OTHER)["committed_version"]
        if committed != "o1":
            assert update(fleet, "o1", OTHER)["phase"] == "UPDATE_PHASE_COMMITTED"
        yield replica


def begun(fleet: Fleet, version: str, model: str) -> str:
    update_id: str = fleet.json("update", version, "--model", model, "--no-wait")["id"]
    return update_id


def ended(fleet: Fleet, update_id: str) -> Any:
    def look() -> Any:
        found = next(u for u in fleet.status()["updates"] if u["id"] == update_id)
        return found if found.get("ended_at") else None

    return wait_for(f"the end of {update_id}", look)


def update(fleet: Fleet, version: str, model: str) -> Any:
    return ended(fleet, begun(fleet, version, model))


def staged(fleet: Fleet) -> list[str]:
    """The digests of the whole images in the stage: a folder each."""
    return sorted(path.name for path in fleet.stage.iterdir() if path.is_dir() and len(path.name) == 64)


def test_updates_of_two_models_at_the_same_time_share_an_agent_and_the_staged_copy(
    fleet: Fleet, second: StandInReplica, other: StandInReplica, published: dict[str, str], oracles: dict[str, Any]
) -> None:
    assert published["o2"] == published["v2"]
    updates = [begun(fleet, "v2", MODEL), begun(fleet, "o2", OTHER)]
    assert [ended(fleet, id_)["phase"] for id_ in updates] == ["UPDATE_PHASE_COMMITTED"] * 2
    assert fleet.outputs() == oracles["v2"]["outputs"]
    assert fleet.replica()["fingerprints"] == oracles["v2"]["fingerprints"]
    # One copy for two models and three engines: the very same folder.
    folder = str(fleet.stage / published["v2"])
    assert second.engine.weights == other.engine.weights == [folder]
    assert staged(fleet).count(published["v2"]) == 1
    assert [node["id"] for node in fleet.status()["nodes"]] == ["node-1"]


def test_a_failure_of_one_model_does_not_touch_the_other(
    fleet: Fleet, second: StandInReplica, other: StandInReplica, oracles: dict[str, Any]
) -> None:
    before = list(other.engine.weights)
    refuses(other.engine, "apply", "the third tensor refused", rank=0)
    updates = [begun(fleet, "v2", MODEL), begun(fleet, "o2", OTHER)]
    mine, theirs = (ended(fleet, id_) for id_ in updates)
    assert mine["phase"] == "UPDATE_PHASE_COMMITTED"
    assert theirs["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert "the third tensor refused" in theirs["reason"]
    assert fleet.outputs() == oracles["v2"]["outputs"]
    assert other.engine.weights == before
    assert not other.engine.paused

    del other.engine.does["apply"]
    refuses(second.engine, "apply", "no room", rank=0)
    updates = [begun(fleet, "v1", MODEL), begun(fleet, "o2", OTHER)]
    mine, theirs = (ended(fleet, id_) for id_ in updates)
    assert mine["phase"] == "UPDATE_PHASE_ROLLED_BACK"
    assert theirs["phase"] == "UPDATE_PHASE_COMMITTED"
    assert fleet.outputs() == oracles["v2"]["outputs"]
    assert {row["replica_id"] for row in mine["replicas"]} == {REPLICA, "engine-2"}


def test_what_one_model_needs_stays_while_the_other_goes_through_its_versions(
    fleet: Fleet, other: StandInReplica, published: dict[str, str], oracles: dict[str, Any]
) -> None:
    """Two images are kept unless more are pinned; these are of two models, and the limit is the node's."""
    assert update(fleet, "v2", MODEL)["phase"] == "UPDATE_PHASE_COMMITTED"
    for version in ("o3", "o1", "o3"):
        assert update(fleet, version, OTHER)["phase"] == "UPDATE_PHASE_COMMITTED"
        assert other.shown()["active_version"] == version
        assert {published["v2"], published[version]} <= set(staged(fleet))
    assert len(staged(fleet)) <= 4
    assert fleet.outputs() == oracles["v2"]["outputs"]
    assert fleet.json("rollback", "--model", MODEL)["phase"] == "UPDATE_PHASE_COMMITTED"
    fleet.json("resume")
    assert fleet.outputs() == oracles["v1"]["outputs"]
    assert other.engine.weights == [str(fleet.stage / published["o3"])]


# Real engines of both models.

ENGINES = {"a-1": (MODEL, "v1"), "a-2": (MODEL, "v1"), "b-1": (OTHER, "v2")}


@pytest.fixture
def node(tmp_path: Path, checkpoints: dict[str, Path]) -> Iterator[tuple[Fleet, dict[str, str]]]:
    """A fleet of its own with three engines, and their addresses. Both models have the same two versions."""
    fleet = Fleet(tmp_path, checkpoints["v1"])
    fleet.stage = fleet.stage.with_name(fleet.stage.name + "-three")
    own = {"HOTWEIGHTS_STAGE_DIR": str(fleet.stage), "HOTWEIGHTS_AGENT_SOCKET": str(fleet.stage / "agent.sock")}
    fleet.environment.update(own)
    try:
        fleet.start_coordinator()
        fleet.start_agent()
        urls = {}
        for replica, (model, version) in ENGINES.items():
            port = free_port()
            urls[replica] = f"http://127.0.0.1:{port}"
            own = {"HOTWEIGHTS_MODEL": model, "HOTWEIGHTS_REPLICA": replica}
            fleet.start_server(replica, checkpoints[version], port, model=model, **own)
        for replica, url in urls.items():
            wait_for("an engine", functools.partial(answers, f"{url}/health"), 3 * ENGINE_DEADLINE_S)
            leave_a_core(fleet.pid(replica))
        for model in (MODEL, OTHER):
            for version, folder in checkpoints.items():
                fleet.json("publish", str(folder), "--model", model, "--version", version)
        yield fleet, urls
    finally:
        fleet.close()
        shutil.rmtree(fleet.stage, ignore_errors=True)


def serves(urls: dict[str, str], replicas: list[str], oracle: dict[str, Any]) -> bool:
    return all(
        [complete(urls[r], ENGINES[r][0], prompt) for prompt in oracle["prompts"]] == oracle["outputs"]
        for r in replicas
    )


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_three_engines_of_two_models_share_one_staged_copy_of_each_image(
    node: tuple[Fleet, dict[str, str]], checkpoints: dict[str, Path], oracles: dict[str, Any]
) -> None:
    fleet, urls = node
    wait_for("what they serve", lambda: all(r["active_version"] for r in fleet.status()["replicas"]))
    assert update(fleet, "v1", MODEL)["phase"] == "UPDATE_PHASE_COMMITTED"
    assert update(fleet, "v2", OTHER)["phase"] == "UPDATE_PHASE_COMMITTED"
    both = ["a-1", "a-2"]
    assert serves(urls, both, oracles["v1"])
    assert serves(urls, ["b-1"], oracles["v2"])

    updates = [begun(fleet, "v2", MODEL), begun(fleet, "v1", OTHER)]  # they cross
    assert [ended(fleet, id_)["phase"] for id_ in updates] == ["UPDATE_PHASE_COMMITTED"] * 2
    assert serves(urls, both, oracles["v2"])
    assert serves(urls, ["b-1"], oracles["v1"])
    images = sum((folder / "model.safetensors").stat().st_size for folder in checkpoints.values()) / (1 << 20)
    assert len(staged(fleet)) == 2
    assert folder_mib(fleet.stage) < 1.2 * images

    # One engine of the first model is gone: its update goes on without it or is aborted, the other model's commits.
    os.killpg(fleet.pid("a-2"), signal.SIGKILL)
    fleet.kill("a-2")
    updates = [begun(fleet, "v1", MODEL), begun(fleet, "v2", OTHER)]
    assert ended(fleet, updates[1])["phase"] == "UPDATE_PHASE_COMMITTED"
    ended(fleet, updates[0])
    assert serves(urls, ["b-1"], oracles["v2"])
    shown = next(r for r in fleet.status()["replicas"] if r["id"] == "a-1")
    assert serves(urls, ["a-1"], oracles[shown["active_version"]])
