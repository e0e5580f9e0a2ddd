"""Containers of the image that share a network, as in Kubernetes."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .buildah import IMAGE, WAIT_S, Buildah, checked

PORT = 5555  # the image's own: each pod has it to itself


class Pod:
    """Containers that share a network, as in Kubernetes: nobody else's port 5555 is in the way."""

    def __init__(self, buildah: Buildah, folder: Path) -> None:
        self._buildah = buildah
        self._folder = folder
        self._network = subprocess.Popen(["unshare", "--net", "--", "sh", "-c", "ip link set lo up && exec sleep 3600"])
        self._containers: list[str] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self._wait_for_network()

    def _wait_for_network(self) -> None:
        ours = os.readlink("/proc/self/ns/net")
        wait_for("a network", lambda: os.readlink(f"/proc/{self._network.pid}/ns/net") != ours)
        wait_for("loopback", lambda: "UP" in checked(self.inside("ip", "link", "show", "lo")))

    def inside(self, *arguments: str) -> list[str]:
        """The command as it is run in this network."""
        return ["nsenter", "--target", str(self._network.pid), "--net", "--", *arguments]

    def container(self, volumes: Mapping[str, Path]) -> "Container":
        """A container of the image; `volumes` are by their path inside."""
        name = self._buildah("from", IMAGE)
        self._containers.append(name)
        mounts = [f"--volume={path}:{inside}" for inside, path in volumes.items()]
        return Container(self._buildah, self, name, mounts, self._folder / f"{name}.log")

    def popen(self, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        process = self._buildah.popen(self.inside(*arguments), log)
        self._running.append(process)
        return process

    def close(self) -> None:
        for process in self._running:
            for pid in [*descendants(process.pid), process.pid]:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait(WAIT_S)
        for name in self._containers:
            self._buildah("rm", name)
        self._network.kill()
        self._network.wait(WAIT_S)


class Container:
    """One root, in which the image's user runs what it is told."""

    def __init__(self, buildah: Buildah, pod: Pod, name: str, mounts: list[str], log: Path) -> None:
        self._buildah, self._pod, self._mounts = buildah, pod, mounts
        self.name = name
        self.log = log

    def start(self, *command: str, **environment: str) -> "Running":
        return Running(self._pod.popen(self._argv(command, environment), self.log), self.log)

    def run(self, *command: str, **environment: str) -> str:
        return checked(self._pod.inside(*self._argv(command, environment)), environment=self._buildah.environment)

    def answers(self, *command: str) -> bool:
        """Whether the command succeeds."""
        argv = self._pod.inside(*self._argv(command, {}))
        environment = {**os.environ, **self._buildah.environment}
        return subprocess.run(argv, capture_output=True, env=environment, timeout=WAIT_S, check=False).returncode == 0

    def _argv(self, command: Sequence[str], environment: dict[str, str]) -> list[str]:
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        return self._buildah.argv("run", *self._mounts, *settings, self.name, "--", *command)


class Running:
    """What a container runs. buildah's own processes stand around the one that is meant, which is the last of them."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return [self.process.pid, *descendants(self.process.pid)][-1]

    def stop(self) -> int:
        """SIGTERM, as every runtime sends it; the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(WAIT_S)


def descendants(pid: int) -> list[int]:
    """Children and theirs, outermost first."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def wait_for(what: str, probe: Any, deadline_s: float = WAIT_S) -> Any:
    """The first true answer of a probe."""
    ends = time.monotonic() + deadline_s
    while time.monotonic() < ends:
        if value := probe():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {deadline_s:.0f} s")
