"""A version with NaN in it, from the command line to a live server: refused before the pause, or taken back."""

from pathlib import Path
from typing import Any

import pytest
from faults import Watch
from fleet import MODEL, Fleet
from random_llama import make_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def bad(running: Fleet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """v1 with three values of one tensor that are no numbers, published."""
    from safetensors.torch import load_file, save_file

    folder: Path = make_checkpoint(tmp_path_factory.mktemp("bad"), 1, "small")
    tensors = load_file(folder / "model.safetensors")
    tensors[KEYS][:3, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    running.json("publish", str(folder), "--model", MODEL, "--version", "bad")
    return "bad"


def test_a_version_with_nan_is_refused_by_tensor_and_count_before_any_pause(
    fleet: Fleet, bad: str, oracles: dict[str, Any], watch: Watch
) -> None:
    watch.about("not-finite")
    before = fleet.replica()
    watch.fault()
    done = fleet.command("update", bad, "--check-finite")
    assert done.returncode == 1
    assert f"{KEYS} has 3 of 32768" in done.stderr
    update = fleet.last_update()
    assert (update["phase"], update["options"]["check_finite"]) == ("UPDATE_PHASE_ABORTED", True)
    assert KEYS in update["reason"]
    assert any(KEYS in event["message"] for event in fleet.status()["events"])
    assert fleet.replica().get("last_window") == before.get("last_window")
    assert fleet.outputs() == oracles["v1"]["outputs"]
    watch.ended("ABORTED, tensor and count named")


def test_a_version_with_nan_that_nobody_looked_at_is_taken_back_while_clients_stream(
    fleet: Fleet, bad: str, oracles: dict[str, Any], watch: Watch
) -> None:
    watch.about("nan-in-cache")
    try:
        assert fleet.json("update", bad)["phase"] == "UPDATE_PHASE_COMMITTED"
        assert fleet.outputs() != oracles["v1"]["outputs"]
        watch.fault()
        assert fleet.json("rollback")["phase"] == "UPDATE_PHASE_COMMITTED"
        assert fleet.outputs() == oracles["v1"]["outputs"]
        watch.recovered()
    finally:
        fleet.json("resume")
    assert fleet.outputs() == oracles["v1"]["outputs"]
    assert fleet.replica()["fingerprints"] == oracles["v1"]["fingerprints"]
    log = (fleet.folder / "engine.log").read_text()
    assert "clearing the KV cache: a value in it was NaN or infinite" in log
    watch.ended("rolled back, the cache cleared", requests_may_fail=True)
    # What the bad version answers has no text; nothing else went wrong.
    assert set(watch.traffic.seen.failures) <= {"a stream ended without a token"}
