"""What the tests of faults share: clients that stream meanwhile, fresh versions, and what must hold afterwards."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet import MODEL, Fleet, wait_for
from live_traffic import Traffic
from tests.faults_recorder import FaultRow

CLIENTS = 2
COMMAND_DEADLINE_S = 60.0


class Watch:
    """Clients on the fleet, and the time from the fault until what was promised is true."""

    def __init__(self, fleet: Fleet, row: FaultRow) -> None:
        self.traffic = Traffic(f"{fleet.url}/v1", MODEL, CLIENTS)
        self._row = row
        self._fault_at = 0.0
        self._recover_s: list[float] = []

    def about(self, key: str) -> None:
        self._row.about(key)

    def fault(self) -> None:
        """Now."""
        self._fault_at = time.monotonic()

    def recovered(self) -> None:
        """All is well again, now."""
        self._recover_s.append(time.monotonic() - self._fault_at)

    def ended(self, outcome: str, *, requests_may_fail: bool = False) -> None:
        """Call it as soon as all is well again. Of several faults the longest time counts."""
        if not self._recover_s:
            self.recovered()
        self.traffic.stop()
        seen = self.traffic.seen
        assert requests_may_fail or seen.failures == [], seen.failures[:3]
        self._row.ended(outcome, recover_s=max(self._recover_s), requests=seen.requests, failed=len(seen.failures))


def fresh_version(fleet: Fleet, like: Path, folder: Path, edit: Callable[[Path], None] | None = None) -> str:
    """Publishes an image that no stage holds yet: the tensors of `like`, after `edit`, and a file of its own."""
    name = fresh_folder(like, folder, edit)
    fleet.json("publish", str(folder), "--model", MODEL, "--version", name)
    return name


def fresh_folder(like: Path, folder: Path, edit: Callable[[Path], None] | None = None) -> str:
    """The folder alone, and the name that it will have as a version."""
    shutil.copytree(like, folder)
    name = f"{like.name}-{time.time_ns():x}"
    (folder / "note.json").write_text(json.dumps({"name": name}))
    if edit is not None:
        edit(folder)
    return name


def started(fleet: Fleet, version: str, *options: str) -> str:
    """The id of an update that was begun and not waited for."""
    update_id: str = fleet.json("update", version, "--no-wait", *options)["id"]
    return update_id


def ended(fleet: Fleet, update_id: str, deadline_s: float = COMMAND_DEADLINE_S) -> Any:
    """The update once it is over."""

    def over() -> Any:
        update = next(u for u in fleet.status()["updates"] if u["id"] == update_id)
        return update if update.get("ended_at") else None

    return wait_for(f"the end of {update_id}", over, deadline_s)


def phase(update: Any) -> str:
    text: str = update["phase"]
    return text.removeprefix("UPDATE_PHASE_")


def assert_ended(update: Any, wanted: str) -> None:
    assert phase(update) == wanted, update.get("reason")


def serves(fleet: Fleet, version: str, oracle: Any) -> None:
    """Outputs, live parameters and status all are the version's."""
    assert fleet.outputs() == oracle["outputs"]
    replica = fleet.replica()
    assert replica["fingerprints"] == oracle["fingerprints"]
    assert replica["active_version"] == version
    assert replica["desired_version"] == version
    assert replica["ready"]


def said(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and output of a command that was begun."""
    output, _ = process.communicate(timeout=COMMAND_DEADLINE_S)
    return process.returncode, output


def weights(folder: Path) -> Path:
    """The one file of weights of a small checkpoint."""
    (path,) = folder.glob("*.safetensors")
    return path


def flip_byte(path: Path, offset: int = -1000) -> None:
    """Of what root may write whatever its mode."""
    with path.open("r+b") as file:
        at = file.seek(offset, 2)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 0x55]))


def killed_at_write(fleet: Fleet, oracles: dict[str, Any], watch: Watch, place: str, *, old: str, new: str) -> str:
    """How an update from `old` ended whose coordinator was killed there and started again; "" if it never came there.

    What is served then is what is desired and committed, wholly.
    """
    before = {update["id"] for update in fleet.status().get("updates", [])}
    fleet.fail_at(f"{place}:kill")
    watch.fault()
    command = fleet.begin("update", new)
    wait_for("the kill or the end", lambda: not fleet.runs("coordinator") or command.poll() is not None)
    fleet.fail_at("")
    if fleet.runs("coordinator"):
        assert said(command)[0] == 0
        return ""
    assert fleet.await_end("coordinator") == -signal.SIGKILL
    fleet.start_coordinator()
    said(command)  # it finds the coordinator again, or has given up
    begun = [update["id"] for update in fleet.status()["updates"] if update["id"] not in before]
    outcome = phase(ended(fleet, begun[0])) if begun else "not begun"
    wait_for("what is desired", lambda: fleet.replica().get("ready"))
    version = new if outcome == "COMMITTED" else old
    serves(fleet, version, oracles[version])
    watch.recovered()
    return outcome
