"""One server for all end-to-end tests: an engine takes a minute to start."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from faults import Watch  # noqa: E402
from fleet import ENGINE_DEADLINE_S, EXAMPLES, MODEL, PROMPTS, PROMPTS_CHECKED, Fleet  # noqa: E402
from oracle import clear_prompts  # noqa: E402
from tests.faults_recorder import FaultRow  # noqa: E402


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random versions of one small model."""
    from random_llama import make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, seed, "small") for seed, name in ((1, "v1"), (2, "v2"))}


@pytest.fixture(scope="session")
def oracles(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Outputs and fingerprints of engines freshly started on each version."""
    found = {}
    for name, folder in checkpoints.items():
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "oracle.py"), str(folder), *prompts],
            capture_output=True,
            text=True,
            timeout=ENGINE_DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    clear = clear_prompts(PROMPTS, list(found.values()), PROMPTS_CHECKED)
    for oracle in found.values():
        oracle["outputs"] = [oracle["outputs"][PROMPTS.index(prompt)] for prompt in clear]
        oracle["prompts"] = clear
    assert found["v1"]["outputs"] != found["v2"]["outputs"], "the versions must be told apart"
    return found


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    """Coordinator, agent and a server on v1; v1 and v2 are published."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), checkpoints["v1"])
    try:
        fleet.start_coordinator()
        fleet.start_agent()
        fleet.start_engine()
        for name, folder in checkpoints.items():
            fleet.json("publish", str(folder), "--model", MODEL, "--version", name)
        # The engine serves v1 already: this commits it without a window.
        assert fleet.json("update", "v1")["phase"] == "UPDATE_PHASE_COMMITTED"
        yield fleet
    finally:
        fleet.close()
        shutil.rmtree(fleet.stage, ignore_errors=True)


@pytest.fixture
def fleet(running: Fleet, oracles: dict[str, Any]) -> Iterator[Fleet]:
    """The fleet serving v1, with no failure injected; each test may leave it on another version."""
    running.prompts = oracles["v1"]["prompts"]
    running.inject("")
    running.fail_at("")
    if running.outputs() != oracles["v1"]["outputs"]:
        running.json("update", "v1")
    assert running.outputs() == oracles["v1"]["outputs"]
    yield running
    running.inject("")
    running.fail_at("")


@pytest.fixture
def watch(fleet: Fleet, fault_row: FaultRow) -> Iterator[Watch]:
    """Clients that stream from the fleet while a fault is injected."""
    watch = Watch(fleet, fault_row)
    watch.traffic.start()
    yield watch
    watch.traffic.stop()
