"""Failures injected by name, for tests: HOTWEIGHTS_FAILPOINTS="apply.tensor=3:raise,apply.start:hang=30".

| name | where | number |
|---|---|---|
| prepare.start | a rank begins to prepare | - |
| apply.start | a rank begins to apply, nothing is written | - |
| apply.tensor | between two tensors of an apply | tensors consumed so far |
| apply.end | everything is written, nothing is proven | - |
| undo.start | a rank begins to undo | - |

Actions: `raise`, `hang=SECONDS`, `kill` (the process, by SIGKILL). Unset, a failpoint costs one dict lookup.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping

NAMES = frozenset({"prepare.start", "apply.start", "apply.tensor", "apply.end", "undo.start"})
HANG_S_MAX = 600.0


class Injected(Exception):
    """A failpoint that was told to raise."""


class BadFailpoint(ValueError):
    """The setting names no failpoint or no action."""


def _raise(name: str) -> None:
    raise Injected(f"failpoint {name}")


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _action(text: str) -> Callable[[str], None]:
    verb, _, argument = text.partition("=")
    if verb == "raise":
        return _raise
    if verb == "kill":
        return _kill
    if verb == "hang":
        seconds = min(float(argument), HANG_S_MAX)
        return lambda name: time.sleep(seconds)
    raise BadFailpoint(f"{text!r}: an action is raise, hang=SECONDS or kill")


class Failpoints:
    """The injected failures of a process."""

    def __init__(self, actions: Mapping[tuple[str, int | None], Callable[[str], None]]) -> None:
        self._actions = actions

    def hit(self, name: str, number: int | None = None) -> None:
        """Does what was injected here, if anything."""
        action = self._actions.get((name, number))
        if action is not None:
            action(name if number is None else f"{name}={number}")


def parse_failpoints(text: str) -> Failpoints:
    """Reads the setting. Raises BadFailpoint."""
    actions: dict[tuple[str, int | None], Callable[[str], None]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        place, _, action = part.partition(":")
        name, _, number = place.partition("=")
        if name not in NAMES:
            raise BadFailpoint(f"{name!r}: a failpoint is one of {', '.join(sorted(NAMES))}")
        actions[name, int(number) if number else None] = _action(action)
    return Failpoints(actions)
