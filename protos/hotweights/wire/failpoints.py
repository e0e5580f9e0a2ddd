"""Failures injected by name, for tests. One variable arms them: HOTWEIGHTS_FAILPOINTS.

    HOTWEIGHTS_FAILPOINTS="apply.tensor=3:raise,stage.bucket=2:hang=5"
    HOTWEIGHTS_FAILPOINTS=@/run/failpoints      the same text from a file, read anew at every pass

`POINTS` lists them, and so do `hotweights failpoints` and docs/RELIABILITY.md. NAME:ACTION acts at every pass,
NAME=N:ACTION at the N-th pass since it was set, or where a point has numbers of its own, at that one. Actions:

    raise         Injected, an error that nobody foresees
    hang=SECONDS  blocks the thread that passes
    kill          the process, by SIGKILL
    stop          the process, by SIGSTOP; SIGCONT lets it go on

Where nothing is armed a pass is one comparison. The variable itself is read in the config.py of each side.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG_S_MAX = 600.0


@dataclass(frozen=True)
class Point:
    """A place in the code where a failure can be injected."""

    name: str
    process: str
    where: str
    number: str = ""
    """What N counts; empty: passes."""


POINTS = (
    Point("store.save.before", "coordinator", "a batch of changes is about to be written"),
    Point("store.save.after", "coordinator", "the batch is durable, nobody was told"),
    Point("publish.begin", "agent", "a folder is to be published, nothing is hashed"),
    Point("publish.hashed", "agent", "the folder is hashed, the coordinator does not know of it"),
    Point("publish.declared", "agent", "the version is durable, the agent has not noted it"),
    Point("stage.begin", "agent", "an image is to be staged, no room is taken"),
    Point("stage.bucket", "agent", "a bucket is in place and right", "buckets that are right"),
    Point("stage.rename.before", "agent", "every bucket is right, the image has not got its name"),
    Point("stage.rename.after", "agent", "the image has its name"),
    Point("stage.report", "agent", "the coordinator is about to hear that the image is staged"),
    Point("window.begin", "controller", "a window is about to pause the engine"),
    Point("window.paused", "controller", "the engine is paused, nothing is written"),
    Point("window.written", "controller", "the ranks wrote, the engine is still paused"),
    Point("window.resumed", "controller", "the engine serves what was written, not all of which is proven yet"),
    Point("window.report", "controller", "the engine goes on, the coordinator has not heard of it"),
    Point("prepare.start", "rank", "a rank begins to prepare"),
    Point("apply.start", "rank", "a rank begins to apply, nothing is written"),
    Point("apply.tensor", "rank", "between two writes of an apply", "writes done, by reload tensors"),
    Point("apply.end", "rank", "everything is written, nothing is proven"),
    Point("undo.start", "rank", "a rank begins to undo"),
)
NAMES = frozenset(point.name for point in POINTS)

Action = Callable[[str], None]


class Injected(Exception):
    """A failpoint that was told to raise."""


class BadFailpoint(ValueError):
    """The setting names no failpoint or no action."""


def _raise(name: str) -> None:
    raise Injected(f"failpoint {name}")


def _send(number: signal.Signals) -> Action:
    return lambda name: os.kill(os.getpid(), number)


def _action(text: str) -> Action:
    verb, _, argument = text.partition("=")
    match verb:
        case "raise":
            return _raise
        case "kill":
            return _send(signal.SIGKILL)
        case "stop":
            return _send(signal.SIGSTOP)
        case "hang" if argument.replace(".", "", 1).isdigit():
            seconds = min(float(argument), HANG_S_MAX)
            return lambda name: time.sleep(seconds)
    raise BadFailpoint(f"{text!r}: an action is raise, hang=SECONDS, kill or stop")


def _parse(text: str) -> dict[tuple[str, int | None], Action]:
    actions: dict[tuple[str, int | None], Action] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        place, _, action = part.partition(":")
        name, separator, number = place.partition("=")
        if name not in NAMES:
            raise BadFailpoint(f"{name!r}: a failpoint is one of {', '.join(sorted(NAMES))}")
        if separator and not number.isdigit():
            raise BadFailpoint(f"{place!r}: a failpoint's number is a whole one")
        actions[name, int(number) if number else None] = _action(action)
    return actions


class Failpoints:
    """The injected failures of a process. Thread-safe."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._read: tuple[int, str] | None = None
        self._actions = {} if self._file is not None else _parse(text)
        self._passes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def hit(self, name: str, number: int | None = None) -> None:
        """Does what was injected here, if anything. Raises Injected, and BadFailpoint for a file that is wrong."""
        assert name in NAMES, f"failpoint {name} is not in the table"
        with self._lock:
            self._follow_file()
            if not self._actions:
                return
            self._passes[name] += 1
            at = self._passes[name] if number is None else number
            action = self._actions.get((name, at)) or self._actions.get((name, None))
        if action is not None:
            action(name if (name, at) not in self._actions else f"{name}={at}")

    def _follow_file(self) -> None:
        """Takes over what a file says by now; writing it again counts passes anew."""
        if self._file is None:
            return
        try:
            now = self._file.stat().st_mtime_ns, self._file.read_text()
        except FileNotFoundError:
            now = 0, ""
        if now != self._read:
            self._read, self._actions = now, _parse(now[1])
            self._passes.clear()


def parse_failpoints(text: str) -> Failpoints:
    """Reads the setting. Raises BadFailpoint."""
    return Failpoints(text)


_armed: Failpoints | None = None


def arm(text: str) -> None:
    """For the whole process; empty disarms. Raises BadFailpoint."""
    global _armed
    _armed = parse_failpoints(text) if text else None


def hit(name: str, number: int | None = None) -> None:
    """A pass. Raises Injected where one is armed to."""
    if _armed is not None:
        _armed.hit(name, number)
