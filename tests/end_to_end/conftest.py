"""One server for all end-to-end tests: an engine takes a minute to start."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from faults import Watch  # noqa: E402
from fleet import PROMPTS_CHECKED, Fleet, wait_for  # noqa: E402
from tests.faults_recorder import FaultRow  # noqa: E402
from tests.oracles import Oracles, Recipe, clear_prompts  # noqa: E402

V1, V2 = Recipe(1, "small"), Recipe(2, "small")


@pytest.fixture(scope="session")
def checkpoints(fresh_engines: Oracles) -> dict[str, Path]:
    """Two random versions of one small model."""
    return {name: fresh_engines.checkpoint(recipe) for name, recipe in (("v1", V1), ("v2", V2))}


@pytest.fixture(scope="session")
def oracles(fresh_engines: Oracles) -> dict[str, Any]:
    """Outputs and fingerprints of engines freshly started on each version."""
    found = {name: fresh_engines.ask(recipe) for name, recipe in (("v1", V1), ("v2", V2))}
    clear = clear_prompts(list(found.values()), PROMPTS_CHECKED)
    told = {
        name: {
            "prompts": clear,
            "outputs": [oracle.outputs[prompt] for prompt in clear],
            "fingerprints": oracle.fingerprints,
        }
        for name, oracle in found.items()
    }
    assert told["v1"]["outputs"] != told["v2"]["outputs"], "the versions must be told apart"
    return told


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    """Coordinator, agent and a server on v1; v1 and v2 are published."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), checkpoints["v1"])
    try:
        fleet.start_all(checkpoints)
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
    wait_for("everybody", running.everybody_is_here)
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
