"""Faults of coordinator, agent, disk and images under a live server that streams meanwhile: no request fails, and what
serves afterwards is wholly the old version or wholly the new one."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    Watch,
    assert_ended,
    ended,
    flip_byte,
    fresh_folder,
    fresh_version,
    killed_at_write,
    phase,
    said,
    serves,
    started,
    weights,
)
from fleet import MODEL, Fleet, await_stopped, wait_for

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400, func_only=True)]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs: needs root")

# The agent.


@pytest.mark.parametrize(
    "place", ["stage.begin", "stage.bucket=20", "stage.rename.before", "stage.rename.after", "stage.report"]
)
def test_an_agent_killed_at_any_step_of_a_staging_goes_on_where_it_was(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path, place: str
) -> None:
    watch.about("agent-killed-staging")
    version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh")
    fleet.fail_at(f"{place}:kill")
    update_id = started(fleet, version)
    assert fleet.await_end("agent") == -signal.SIGKILL
    watch.fault()
    fleet.fail_at("")
    fleet.start_agent()
    assert_ended(ended(fleet, update_id), "COMMITTED")
    serves(fleet, version, oracles["v2"])
    watch.ended("COMMITTED")


def test_an_agent_killed_while_the_engine_applies_is_not_missed(
    fleet: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    watch.about("agent-killed-applying")
    fleet.inject("apply.start:hang=8")
    update_id = started(fleet, "v2")
    fleet.wait_for_phase(update_id, "APPLYING")
    watch.fault()
    fleet.kill("agent")
    assert_ended(ended(fleet, update_id), "COMMITTED")
    serves(fleet, "v2", oracles["v2"])
    watch.ended("COMMITTED")
    fleet.start_agent()


@pytest.mark.parametrize("place", ["publish.begin", "publish.hashed", "publish.declared"])
def test_an_agent_killed_while_it_publishes_half_publishes_nothing(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path, place: str
) -> None:
    watch.about("agent-killed-publishing")
    version = fresh_folder(checkpoints["v2"], tmp_path / "fresh")
    fleet.fail_at(f"{place}:kill")
    publishing = fleet.begin("publish", str(tmp_path / "fresh"), "--model", MODEL, "--version", version)
    assert fleet.await_end("agent") == -signal.SIGKILL
    watch.fault()
    declared = place == "publish.declared"
    assert (version in names(fleet)) == declared, "whole or not at all"
    fleet.fail_at("")
    fleet.start_agent()
    code, output = said(publishing)
    assert code == 0, output
    assert_ended(fleet.json("update", version), "COMMITTED")
    serves(fleet, version, oracles["v2"])
    watch.ended("the publisher waited for the agent and published")


def names(fleet: Fleet) -> list[str]:
    return [version["name"] for version in fleet.json("versions")]


def test_an_agent_that_stops_for_longer_than_its_lease_ends_the_update_and_not_the_serving(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path
) -> None:
    watch.about("agent-stopped")
    with short_leases(fleet):
        version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh")
        fleet.fail_at("stage.bucket=20:stop")
        update_id = started(fleet, version)
        fleet.await_stop("agent")
        watch.fault()
        update = ended(fleet, update_id)
        assert_ended(update, "ABORTED")
        assert "no agent on node node-1" in update["reason"]
        serves(fleet, "v1", oracles["v1"])
        fleet.fail_at("")
        fleet.send("agent", signal.SIGCONT)
        wait_for("the agent", lambda: fleet.status()["nodes"][0].get("connected"))
        assert_ended(fleet.json("update", version), "COMMITTED")
        serves(fleet, version, oracles["v2"])
        watch.ended("ABORTED; continued, the next update COMMITTED")


# The coordinator.


@contextlib.contextmanager
def short_leases(fleet: Fleet) -> Iterator[None]:
    """A coordinator that notices after four seconds who is gone."""
    fleet.kill("coordinator")
    fleet.start_coordinator("--heartbeat", "1", "--lease", "4")
    wait_for("everybody", fleet.everybody_is_here)
    yield
    fleet.kill("coordinator")
    fleet.start_coordinator()
    wait_for("everybody", fleet.everybody_is_here)


def test_a_coordinator_that_stops_for_longer_than_every_lease_takes_nobody_for_lost(
    fleet: Fleet, oracles: dict[str, Any], watch: Watch
) -> None:
    watch.about("coordinator-stopped")
    with short_leases(fleet):
        fleet.inject("prepare.start:hang=8")
        update_id = started(fleet, "v2")
        fleet.wait_for_phase(update_id, "STAGING")
        watch.fault()
        fleet.send("coordinator", signal.SIGSTOP)
        time.sleep(8)
        fleet.send("coordinator", signal.SIGCONT)
        assert_ended(ended(fleet, update_id), "COMMITTED")
        serves(fleet, "v2", oracles["v2"])
        watch.ended("COMMITTED")


@pytest.mark.parametrize(
    "place", ["store.save.before=1", "store.save.after=1", "store.save.before=4", "store.save.after=5"]
)
def test_a_coordinator_killed_at_a_durable_write_ends_the_update_when_it_is_back(
    fleet: Fleet, oracles: dict[str, Any], watch: Watch, place: str
) -> None:
    watch.about("coordinator-killed-at-write")
    outcome = killed_at_write(fleet, oracles, watch, place, old="v1", new="v2")
    assert outcome, "an update makes more writes than that"
    watch.ended(outcome)


# What is published, staged and kept.


@needs_root
def test_a_stage_without_room_is_told_with_figures_and_nothing_is_written(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path
) -> None:
    watch.about("stage-full")
    fleet.kill("agent")
    with small_disk(fleet.stage, mebibytes=4):
        fleet.start_agent()
        fleet.json("publish", str(checkpoints["v1"]), "--model", MODEL, "--version", "v1")  # the way back has a source
        version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh")
        watch.fault()
        update = ended(fleet, started(fleet, version))
        assert_ended(update, "ABORTED")
        assert re.search(r"needs \S+ MiB \(\d+ bytes\) more for this image and has \S+ MiB", update["reason"])
        serves(fleet, "v1", oracles["v1"])
        fleet.kill("agent")
    fleet.start_agent()
    fleet.json("publish", str(tmp_path / "fresh"), "--model", MODEL, "--version", version)
    assert_ended(fleet.json("update", version), "COMMITTED")
    serves(fleet, version, oracles["v2"])
    watch.ended("ABORTED with figures; with room COMMITTED")


@needs_root
def test_a_full_disk_under_the_store_refuses_commands_and_keeps_reports(
    fleet: Fleet, oracles: dict[str, Any], watch: Watch, tmp_path: Path
) -> None:
    watch.about("store-full")
    with store_on_small_disk(fleet, tmp_path / "small") as filler:
        fill(filler)
        watch.fault()
        refused = fleet.command("update", "v2")
        assert refused.returncode == 1
        assert "nothing was changed: the coordinator's store takes no writes" in refused.stderr
        serves(fleet, "v1", oracles["v1"])
        filler.unlink()

        fleet.inject("apply.start:hang=8")
        update_id = started(fleet, "v2")
        fleet.wait_for_phase(update_id, "APPLYING")
        fill(filler)
        wait_for("a report that cannot be kept", lambda: store_refusals(fleet) > 1)
        assert fleet.wait_for_phase(update_id, "APPLYING")
        filler.unlink()
        assert_ended(ended(fleet, update_id), "COMMITTED")
        serves(fleet, "v2", oracles["v2"])
        watch.ended("refused before, COMMITTED when there was room again")


def store_refusals(fleet: Fleet) -> int:
    return (fleet.folder / "coordinator.log").read_text().count("the store takes no writes")


def fill(filler: Path) -> None:
    """Takes all the room there is."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Over the folder, whose content is there again afterwards."""
    size = f"size={mebibytes}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@contextlib.contextmanager
def store_on_small_disk(fleet: Fleet, folder: Path) -> Iterator[Path]:
    """The coordinator with its store on a disk of its own, and a path there that takes the room away."""
    folder.mkdir()
    usual = fleet.folder / "coordinator.db"
    with small_disk(folder, mebibytes=8):
        moved = folder / usual.name
        fleet.kill("coordinator")
        move_store(usual, moved)
        fleet.start_coordinator(store=moved)
        wait_for("all of them", lambda: fleet.everybody_is_here() and fleet.replica().get("ready"))
        try:
            yield folder / "filler"
        finally:
            fleet.kill("coordinator")
            move_store(moved, usual)
    fleet.start_coordinator()
    wait_for("all of them", lambda: fleet.everybody_is_here() and fleet.replica().get("ready"))


def move_store(old: Path, new: Path) -> None:
    with contextlib.closing(sqlite3.connect(old)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.move(old, new)


@pytest.mark.parametrize("when", ["staged", "read by the ranks", "at the window"])
def test_a_staged_image_that_is_altered_is_never_installed(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path, when: str
) -> None:
    watch.about("image-altered")
    version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh")
    file = staged_weights(fleet, version)
    if when == "read by the ranks":
        (core,) = fleet.replica()["ranks"]
        fleet.inject("prepare.start:stop")
        update_id = started(fleet, version)
        await_stopped(core["pid"])
        flip_byte(file)
        watch.fault()
        os.kill(core["pid"], signal.SIGCONT)
        fleet.inject("")
    else:
        process, failpoint = {
            "staged": ("agent", "stage.rename.after:stop"),
            "at the window": ("engine", "window.begin:stop"),
        }[when]
        fleet.fail_at(failpoint)
        update_id = started(fleet, version)
        fleet.await_stop(process)
        while not file.exists():  # it was the way back that was staged
            fleet.send(process, signal.SIGCONT)
            fleet.await_stop(process)
        flip_byte(file)
        watch.fault()
        fleet.fail_at("")
        fleet.send(process, signal.SIGCONT)
    update = ended(fleet, update_id)
    assert_ended(update, "ROLLED_BACK" if when == "at the window" else "ABORTED")
    assert "was altered" in update["reason"]
    serves(fleet, "v1", oracles["v1"])
    assert_ended(fleet.json("update", version), "COMMITTED")
    serves(fleet, version, oracles["v2"])
    watch.ended(f"{phase(update)}; the next update COMMITTED")


def staged_weights(fleet: Fleet, version: str) -> Path:
    digest = next(v["manifest_digest"] for v in fleet.json("versions") if v["name"] == version)
    return fleet.stage / str(digest) / "model.safetensors"


def test_a_folder_rewritten_while_it_is_published_is_refused_by_name(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path
) -> None:
    watch.about("folder-rewritten-publishing")
    version = fresh_folder(checkpoints["v2"], tmp_path / "fresh")
    fleet.fail_at("publish.hashed:stop")
    publishing = fleet.begin("publish", str(tmp_path / "fresh"), "--model", MODEL, "--version", version)
    fleet.await_stop("agent")
    flip_byte(weights(tmp_path / "fresh"))
    watch.fault()
    fleet.fail_at("")
    fleet.send("agent", signal.SIGCONT)
    code, output = said(publishing)
    assert code == 1
    assert "model.safetensors" in output
    assert "changed since it was hashed" in output
    assert version not in names(fleet)
    serves(fleet, "v1", oracles["v1"])
    watch.ended("refused, nothing published")


def test_a_published_folder_rewritten_while_it_is_staged_from_is_not_offered_any_more(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path
) -> None:
    watch.about("folder-rewritten-staging")
    version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh")
    fleet.fail_at("stage.bucket=5:stop")
    update_id = started(fleet, version)
    fleet.await_stop("agent")
    weights(tmp_path / "fresh").write_bytes(weights(checkpoints["v1"]).read_bytes())
    watch.fault()
    fleet.fail_at("")
    fleet.send("agent", signal.SIGCONT)
    update = ended(fleet, update_id)
    assert_ended(update, "ABORTED")
    assert "changed since it was hashed" in update["reason"]
    serves(fleet, "v1", oracles["v1"])
    again = fleet.command("update", version)
    assert again.returncode == 1
    assert "publish its folder again" in again.stderr
    watch.ended("ABORTED, its version unavailable")


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "dtype"])
def test_a_version_that_does_not_fit_is_refused_by_the_tensors_name_before_the_pause(
    fleet: Fleet, oracles: dict[str, Any], checkpoints: dict[str, Path], watch: Watch, tmp_path: Path, what: str
) -> None:
    watch.about("version-does-not-fit")
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(folder: Path) -> None:
        tensors = load_file(weights(folder))
        tensor = tensors[name]
        match what:
            case "missing":
                del tensors[name]
            case "extra":
                tensors[f"{name}.more"] = tensor.clone()
            case "shape":
                tensors[name] = tensor[:, :-1].contiguous()
            case "dtype":
                tensors[name] = tensor.to(torch.float16)
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    version = fresh_version(fleet, checkpoints["v2"], tmp_path / "fresh", spoil)
    watch.fault()
    update = ended(fleet, started(fleet, version))
    assert_ended(update, "ABORTED")
    assert name in update["reason"]
    serves(fleet, "v1", oracles["v1"])
    watch.ended("ABORTED, the tensor named")
