"""Following an update to its end, over a coordinator that restarts meanwhile."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hotweights.cli.client import Coordinator
from hotweights.cli.errors import CommandFailed
from hotweights.cli.output import counted, one_line, pause, word
from hotweights.cli.progress import Bar
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import update_pb2
from hotweights.wire.errors import Unreachable

T = TypeVar("T")

POLL_S = 0.2
# So long may a coordinator be away while somebody follows: a restart takes seconds.
AWAY_MAX_S = 30.0

_ENDED = {update_pb2.UPDATE_PHASE_COMMITTED, update_pb2.UPDATE_PHASE_ROLLED_BACK, update_pb2.UPDATE_PHASE_ABORTED}
_UNTOUCHED = {
    update_pb2.REPLICA_OUTCOME_UNSPECIFIED,
    update_pb2.REPLICA_OUTCOME_STAGING,
    update_pb2.REPLICA_OUTCOME_PREPARED,
    update_pb2.REPLICA_OUTCOME_APPLYING,
}


async def wait_for_end(
    coordinator: Coordinator, update: update_pb2.Update, wait_s: float, *, quiet: bool
) -> update_pb2.Update:
    """The update once it has ended, its steps told as they come. Raises CommandFailed when `wait_s` is over."""
    ends_at = time.monotonic() + wait_s
    request = pb.GetUpdateRequest(id=update.id)

    def look() -> Awaitable[pb.GetUpdateResponse]:
        return coordinator.ask(request, pb.GetUpdateResponse)

    with Bar(f"staging {update.target_version}", wanted=not quiet) as bar:
        teller = _Teller(bar, quiet=quiet)
        teller.tell_start(update)
        while True:
            teller.tell(update)
            if update.phase in _ENDED:
                return update
            if time.monotonic() > ends_at:
                raise CommandFailed(f"{update.id} has not ended within {wait_s:g} s; it goes on")
            await asyncio.sleep(POLL_S)
            update = (await patient(look)).update


async def patient(ask: Callable[[], Awaitable[T]]) -> T:
    """A read, repeated while the coordinator is away. Raises Unreachable after AWAY_MAX_S."""
    ends_at = time.monotonic() + AWAY_MAX_S
    while True:
        try:
            return await ask()
        except Unreachable:
            if time.monotonic() > ends_at:
                raise
            await asyncio.sleep(1.0)


class _Teller:
    """Lines for what changed since the last look."""

    def __init__(self, bar: Bar, *, quiet: bool) -> None:
        self._bar = bar
        self._quiet = quiet
        self._step: tuple[int, int] | None = None
        self._outcomes: dict[str, int] = {}

    def tell_start(self, update: update_pb2.Update) -> None:
        self._say(
            f"{update.id}: {word(update_pb2.UpdateKind, update.kind)} update of {update.model} from "
            f"{update.base_version or 'unversioned'} to {update.target_version}, "
            f"{counted(len(update.replicas), 'replica')} on {counted(len(update.nodes), 'node')}"
        )

    def tell(self, update: update_pb2.Update) -> None:
        if update.phase == update_pb2.UPDATE_PHASE_STAGING:
            if any(node.bytes_total for node in update.nodes):
                self._bar.each(update.nodes)
        else:
            self._bar.stop()
        for row in update.replicas:
            if self._outcomes.get(row.replica_id) != row.outcome and row.outcome not in _UNTOUCHED:
                self._say(f"{update.id}: {outcome_line(row)}")
            self._outcomes[row.replica_id] = row.outcome
        if self._step != (update.phase, update.wave) and update.phase not in _ENDED:
            is_applying = update.phase == update_pb2.UPDATE_PHASE_APPLYING
            wave = f", wave {update.wave + 1} of {update.wave_count}" if is_applying else ""
            self._say(f"{update.id}: {word(update_pb2.UpdatePhase, update.phase)}{wave}")
        self._step = (update.phase, update.wave)

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(one_line(line), flush=True)


def outcome_line(row: update_pb2.UpdateReplica) -> str:
    """What became of one replica."""
    paused = f", pause {pause(row.window)}" if row.HasField("window") else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.replica_id} {word(update_pb2.ReplicaOutcome, row.outcome)}{paused}{reason}"


def show_end(update: update_pb2.Update, *, quiet: bool) -> int:
    """Says how it ended; a reason always, on stderr. Returns the exit code: 0 only for a commit."""
    if update.phase == update_pb2.UPDATE_PHASE_COMMITTED:
        took_s = (update.ended_at.ToMilliseconds() - update.started_at.ToMilliseconds()) / 1000
        if not quiet:
            print(f"{update.id}: committed to {update.target_version} after {took_s:.1f} s")
        return 0
    phase = word(update_pb2.UpdatePhase, update.phase)
    reason = one_line(update.reason) or "no reason was given"
    print(f"hotweights: update {update.id} to {update.target_version} was {phase}: {reason}", file=sys.stderr)
    return 1


async def until(look: Callable[[], Awaitable[T | None]], wait_s: float) -> T | None:
    """What `look` finds in the end, or None when `wait_s` is over."""
    ends_at = time.monotonic() + wait_s
    while True:
        found = await patient(look)
        if found is not None or time.monotonic() > ends_at:
            return found
        await asyncio.sleep(POLL_S)
