"""The processes of the live demo: each with its log, each ended by its id whatever happens."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

ENGINE_DEADLINE_S = 420.0
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 30.0


class DemoFailed(Exception):
    """The demo cannot go on; the message says which part and where its log is."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def leave_a_core(engine: int) -> None:
    """Moves an engine off the first core, when there are more, given the leader of its session.

    Best once it serves: starting keeps two cores busy.

    vLLM's processes wait for each other with sched_yield. While an engine generates without pause on every core,
    Linux 6.18 lets a process of another session wait for half a minute: `python -m benchmarks.starved` shows it.
    """
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        return
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            session = stat.read_text().rpartition(")")[2].split()[3]
            for thread in (stat.parent / "task").iterdir() if session == str(engine) else ():
                os.sched_setaffinity(int(thread.name), cores[1:])


class Processes:
    """What was started, in the environment given. Leaving ends all of it."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs = logs
        self._environment = {**os.environ, **environment}
        self._running: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for name, _, _ in reversed(list(self._running)):
            self.stop(name)

    def start(self, name: str, arguments: Sequence[str]) -> int:
        """A module of this Python in a process group of its own; its process id."""
        log = (self._logs / f"{name}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        self._running.append((name, process, log))
        return process.pid

    def stop(self, name: str) -> None:
        """Asks it to end, then ends its group."""
        for entry in [entry for entry in self._running if entry[0] == name]:
            _, process, log = entry
            self._running.remove(entry)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_DEADLINE_S)
            _kill_group(process.pid)
            process.wait(STOP_DEADLINE_S)
            log.close()

    def wait_until(self, name: str, ready: Callable[[], bool], deadline_s: float) -> None:
        """Raises DemoFailed when the process ends first or the time is over."""
        process = next(p for n, p, _ in self._running if n == name)
        ends = time.monotonic() + deadline_s
        while time.monotonic() < ends:
            if ready():
                return
            if process.poll() is not None:
                raise DemoFailed(f"{name} ended with {process.returncode}{self._tail(name)}")
            time.sleep(0.1)
        raise DemoFailed(f"{name} was not ready within {deadline_s:.0f} s{self._tail(name)}")

    def _tail(self, name: str) -> str:
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "; its log ends with\n  " + "\n  ".join(lines[-15:])

    def run_json(self, arguments: Sequence[str], deadline_s: float = 60.0) -> Any:
        """A command's output as JSON. Raises DemoFailed with what it said instead."""
        done = self._run(arguments, deadline_s)
        # vLLM logs to stdout as well: the answer is the first object that begins a line.
        start = ("\n" + done.stdout).find("\n{")
        if done.returncode or start < 0:
            raise DemoFailed(f"{' '.join(arguments)} exited {done.returncode}: {done.stderr[-2000:]}")
        return json.JSONDecoder().raw_decode(done.stdout[start:])[0]

    def _run(self, arguments: Sequence[str], deadline_s: float) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=self._environment,
                timeout=deadline_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(f"{' '.join(arguments)} did not end within {deadline_s:.0f} s") from error


def _kill_group(pid: int) -> None:
    """The processes that a server left behind: its engine core and workers share its group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
