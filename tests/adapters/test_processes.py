"""Processes told apart, and engine cores that end with their front end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotweights.adapters import processes
from hotweights.worker_client.window.engine import Process

# A front end that starts a core; the core starts a child, as it starts ranks, and says who they are.
FRONT_END = """
import multiprocessing, signal, subprocess, sys, time

def core(deaf):
    from hotweights.adapters import processes
    processes.END_GRACE_S = 0.5
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes.end_with_parent()
    child = subprocess.Popen(["sleep", "600"])
    print(multiprocessing.current_process().pid, child.pid, flush=True)
    while True:
        time.sleep(0.1)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=core, args=(sys.argv[1] == "deaf",)).start()
    time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone() -> None:
    own = processes.process(os.getpid())
    assert processes.is_alive(own)
    assert not processes.is_alive(Process(own.pid, own.started + 1))
    child = subprocess.Popen(["sleep", "600"])
    try:
        assert child.pid in processes.children(os.getpid())
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("hears", ["hears", "deaf"])
def test_an_engine_core_ends_when_its_front_end_is_killed(tmp_path: Path, hears: str) -> None:
    """By SIGTERM; one that hangs and does not hear it, with its ranks."""
    script = tmp_path / "front_end.py"
    script.write_text(FRONT_END)
    front_end = subprocess.Popen([sys.executable, str(script), hears], stdout=subprocess.PIPE, text=True)
    assert front_end.stdout is not None
    core, child = (int(pid) for pid in front_end.stdout.readline().split())
    try:
        assert not is_gone(core)
        front_end.kill()
        front_end.wait()
        ends = time.monotonic() + 20
        while not is_gone(core) and time.monotonic() < ends:
            time.sleep(0.05)
        assert is_gone(core)
        assert is_gone(child) == (hears == "deaf")  # what hears SIGTERM looks after its own
    finally:
        front_end.stdout.close()
        if not is_gone(child):
            os.kill(child, signal.SIGKILL)
