"""The command line as processes: what they print, how they end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 20.0
COMMAND = (sys.executable, "-m", "hotweights.cli")


@dataclass
class Node:
    """A folder for stage, stores and logs; `run` takes the command line's arguments. All get `access` as variables."""

    folder: Path
    access: dict[str, str] = field(default_factory=dict)

    def environment(self, **settings: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOTWEIGHTS_")}
        own = {
            "HOTWEIGHTS_NODE": "here",
            "HOTWEIGHTS_STAGE_DIR": str(self.folder / "stage"),
            "HF_HUB_CACHE": str(self.folder / "hub"),
            "XDG_STATE_HOME": str(self.folder / "state"),
        }
        return {**inherited, **own, **self.access, **settings}

    def run(self, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(**settings),
            timeout=DEADLINE_S,
            check=False,
        )


@dataclass
class Serving:
    """A running coordinator and the node that talks to it."""

    node: Node
    process: "subprocess.Popen[str]"
    endpoint: str
    first_line: str

    def run(self, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        return self.node.run(*arguments, HOTWEIGHTS_ENDPOINT=self.endpoint, **settings)

    def text(self, *arguments: str) -> str:
        """Of a command that must succeed."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def refusal(self, *arguments: str, code: int = 1) -> str:
        """The one line of a command that must fail."""
        done = self.run(*arguments)
        assert done.returncode == code, (done.stdout, done.stderr)
        return one_line(done.stderr)

    def log(self) -> str:
        return (self.node.folder / "coordinator.log").read_text()


def one_line(stderr: str) -> str:
    """The only line there is, without the program's name."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("hotweights: ")
    return lines[0].removeprefix("hotweights: ")


def start_coordinator(node: Node, *arguments: str) -> Serving:
    with (node.folder / "coordinator.log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "coord-serve", "--endpoint", "tcp://127.0.0.1:0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=node.environment(),
        )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    line = process.stdout.readline() if readable else ""
    if not line.startswith(("coordinator at tcp://", "coordinator at grpcs://")):
        stop(process)
        raise AssertionError(f"it printed {line!r} and logged {(node.folder / 'coordinator.log').read_text()}")
    return Serving(node, process, line.split()[2].rstrip(","), line)


def start_agent(serving: Serving) -> "subprocess.Popen[str]":
    """Returns when the coordinator knows it."""
    with (serving.node.folder / "agent.log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "agent", "--endpoint", serving.endpoint],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
            env=serving.node.environment(),
        )
    ends_at = time.monotonic() + DEADLINE_S
    while not any(node["connected"] for node in serving.json("coord-status")["nodes"]):
        if process.poll() is not None or time.monotonic() > ends_at:
            stop(process)
            raise AssertionError((serving.node.folder / "agent.log").read_text())
        time.sleep(0.1)
    return process


def stop(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGTERM) -> int:
    """Asks it to end. Returns its exit code; a process that does not listen is killed."""
    process.send_signal(number)
    try:
        return process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
