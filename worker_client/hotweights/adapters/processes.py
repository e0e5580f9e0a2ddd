"""Processes of this machine, told apart by id and start time, as /proc has them; elsewhere nothing is known."""

import contextlib
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
import time
from pathlib import Path

from hotweights.worker_client.window.engine import Process

log = logging.getLogger(__name__)

END_GRACE_S = 5.0
_PROC = Path("/proc")
_PARENT, _STARTED = 1, 19  # fields of /proc/PID/stat after the command's name


def _fields(pid: int | str) -> list[str]:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile, or there is no /proc
        return []


def process(pid: int) -> Process:
    """The process that has this id now."""
    fields = _fields(pid)
    return Process(pid, int(fields[_STARTED]) if fields else 0)


def is_alive(known: Process) -> bool:
    """Whether it is still the one that was known; True where the system does not tell."""
    return process(known.pid).started == known.started


def children(pid: int) -> list[int]:
    """Ids of a live process's children."""
    folders = _PROC.glob("[0-9]*")
    return [int(folder.name) for folder in folders if _parent(folder.name) == pid]


def _parent(pid: str) -> int:
    fields = _fields(pid)
    return int(fields[_PARENT]) if fields else 0


def end_with_parent() -> None:
    """From now on this process ends when its parent is gone: by SIGTERM, then by SIGKILL and with its children.

    vLLM's engine core outlives a front end that was killed, and nobody could reach it any more.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), name="hotweights-end-with-parent", daemon=True).start()


def _end_after(parent: "multiprocessing.process.BaseProcess") -> None:
    parent.join()
    own = os.getpid()
    log.error("the front end (process %s) is gone: this engine ends", parent.pid)
    os.kill(own, signal.SIGTERM)
    time.sleep(END_GRACE_S)
    for pid in (*children(own), own):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, signal.SIGKILL)
