"""An offline LLM follows its model beside a server that follows another, on one coordinator and one agent."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import ENGINE_DEADLINE_S, EXAMPLES, HERE, Fleet, wait_for
from live_processes import leave_a_core

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("offline LLM"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

MODEL = "offline"
STOP_S = 60.0


class Offline:
    """The program and the last batch that it printed."""

    def __init__(self, fleet: Fleet, folder: Path, log: Path) -> None:
        environment = {
            **fleet.environment,
            "HOTWEIGHTS_REPLICA": "offline-1",
            "HOTWEIGHTS_USE_IPC_AGENT": "1",
            "HOTWEIGHTS_FAILPOINTS": "",
            "TEST_WARM": "1",
            "PYTHONPATH": f"{EXAMPLES}:{HERE.parents[1]}:{fleet.environment['PYTHONPATH']}",
        }
        self.last: dict[str, Any] = {}
        command = [sys.executable, str(HERE / "offline.py"), str(folder), fleet.endpoint, MODEL, *fleet.prompts]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # vLLM logs to stdout as well
                self.last = json.loads(line)

    def leave_a_core(self) -> None:
        leave_a_core(self._process.pid)

    def serves(self, version: str, outputs: list[str]) -> bool:
        assert self._process.poll() is None
        return self.last == {"version": version, "outputs": outputs}

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(STOP_S)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its engine core outlives it otherwise
        self._process.wait(STOP_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def offline(fleet: Fleet, checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[Offline]:
    offline = Offline(fleet, checkpoints["v1"], tmp_path / "offline.log")
    yield offline
    offline.close()


def test_an_offline_llm_is_swapped_while_it_generates_and_goes_back_and_ends_by_itself(
    fleet: Fleet, offline: Offline, checkpoints: dict[str, Path], oracles: dict[str, Any]
) -> None:
    fleet.json("publish", str(checkpoints["v1"]), "--model", MODEL, "--version", "v1")
    of = {name: oracle["outputs"] for name, oracle in oracles.items()}
    # The name of what it was started on is the coordinator's to know; it learns names with its first update.
    wait_for("v1", lambda: offline.serves("", of["v1"]), ENGINE_DEADLINE_S)
    offline.leave_a_core()
    # Its policy is auto, as install_autobind asks: nobody has to start the update.
    fleet.json("publish", str(checkpoints["v2"]), "--model", MODEL, "--version", "v2")
    wait_for("v2", lambda: offline.serves("v2", of["v2"]))
    assert fleet.json("rollback", "--model", MODEL)["phase"] == "UPDATE_PHASE_COMMITTED"
    wait_for("v1 again", lambda: offline.serves("v1", of["v1"]))
    assert fleet.outputs() == of["v1"], "the server follows a model of its own"
    assert offline.end() == 0
    wait_for("its leaving", lambda: not _connected(fleet))


def _connected(fleet: Fleet) -> bool:
    return any(replica["id"] == "offline-1" and replica.get("connected") for replica in fleet.status()["replicas"])
