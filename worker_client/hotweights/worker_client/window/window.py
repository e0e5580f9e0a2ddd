"""The window: pause, apply, prove, resume; every wait with a deadline, every failure with an end.

                          validity over                a rank not ok, a cache not reset
    order --> EXPIRED <--- [pause] ---> [apply, prove] ---------------> [undo, prove] --> [resume] --> UNDONE
                              |               |  \\                           |
                              |               |   +-> [tag, reset, resume] --> APPLIED
                              +-- no answer --+---- no answer, not proven ----+--> kill the engine: TORN

After TORN nobody calls the engine again: a rank that does not answer blocks the engine's loop, so an undo could
never run, and a late answer would be taken for another call's.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from hotweights.wire import failpoints
from hotweights.worker_client.window.engine import Engine, EngineFailed, PauseMode, Process, Status

RESUME_DEADLINE_S = 10.0
KILL_DEADLINE_S = 10.0
OVERSLEPT_S = 1.0
T = TypeVar("T")


class Outcome(Enum):
    """How a window ended."""

    APPLIED = "applied"
    EXPIRED = "expired"
    UNDONE = "undone"
    TORN = "torn"


@dataclass(frozen=True)
class WindowOrder:
    """What to do in one window. Deadlines in seconds, `begin_by` on the clock of time.monotonic."""

    folder: str
    """The prepared image; "" puts back the kept copies instead."""
    version: str
    mode: PauseMode
    begin_by: float
    quiesce_deadline_s: float
    apply_deadline_s: float
    expected: tuple[bytes, ...] = ()
    """Fingerprints the ranks must have afterwards, where they are known."""
    no_way_back: str = ""
    """Why the weights of before cannot be brought back; empty where they can."""
    processes: tuple[Process, ...] = ()
    """What to end when the engine is in doubt; empty leaves it paused for ever."""


@dataclass
class Times:
    """Milliseconds of each part; 0 for a part that was not reached."""

    quiesce_ms: float = 0.0
    apply_ms: float = 0.0
    resume_ms: float = 0.0


@dataclass
class WindowResult:
    """What became of a window."""

    outcome: Outcome
    reason: str = ""
    times: Times = field(default_factory=Times)
    fingerprints: tuple[bytes, ...] = ()
    answers: tuple[Status, ...] = ()
    note: str = ""


class Unanswered(Exception):
    """A call to the engine did not end in time; whether it took effect is unknown."""

    def __init__(self, what: str, deadline_s: float) -> None:
        super().__init__(f"{what} did not answer within {deadline_s:g} s")


class Unproven(Exception):
    """The ranks answered, and it cannot be told what is installed."""


async def within(deadline_s: float, what: str, call: Awaitable[T]) -> T:
    """The call's result. Raises Unanswered; the call itself is left to end or not, never cancelled half-way.

    Where this process itself stood still meanwhile, the answer may lie here unread: then it is waited for once more.
    """
    task = asyncio.ensure_future(call)
    overslept_at = time.monotonic() + deadline_s + OVERSLEPT_S
    done, _ = await asyncio.wait({task}, timeout=deadline_s)
    if not done and time.monotonic() > overslept_at:
        done, _ = await asyncio.wait({task}, timeout=deadline_s)
    if not done:
        task.add_done_callback(drop_late)
        raise Unanswered(what, deadline_s)
    return task.result()


def drop_late(task: "asyncio.Future[Any]") -> None:
    """A result that came too late is nobody's; asking for its error keeps asyncio from complaining."""
    if not task.cancelled():
        task.exception()


async def call_ranks(engine: Engine, method: str, deadline_s: float, *args: Any) -> list[Status]:
    """One answer of every rank to this very call. Raises Unanswered, Unproven, EngineFailed."""
    call = uuid.uuid4().hex
    answers = await within(deadline_s, method, engine.rpc(method, call, *args))
    strangers = [answer for answer in answers if answer.get("call") != call]
    if strangers or len(answers) != engine.facts.rank_count:
        raise Unproven(
            f"{method}: {len(answers)} answers of {engine.facts.rank_count}, {len(strangers)} to another call"
        )
    return answers


def refusals(answers: list[Status]) -> str:
    """Why ranks are not ok; empty when all are."""
    return "; ".join(f"rank {answer['rank']}: {answer['reason']}" for answer in answers if not answer["ok"])


def fingerprints(answers: list[Status]) -> tuple[bytes, ...]:
    """In the order of the ranks."""
    return tuple(bytes(answer["fingerprint"]) for answer in sorted(answers, key=lambda answer: int(answer["rank"])))


class Window:
    """One window on one engine. `before` is what the ranks proved to serve when they prepared."""

    def __init__(
        self, engine: Engine, order: WindowOrder, before: tuple[bytes, ...], clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._order = order
        self._before = before
        self._clock = clock
        self._times = Times()

    async def run(self) -> WindowResult:
        """Goes through it once. Never raises for what an engine does."""
        if self._clock() > self._order.begin_by:
            return WindowResult(Outcome.EXPIRED, "the order was not valid any longer when the pause would have begun")
        try:
            return await self._open()
        except (Unanswered, Unproven, EngineFailed) as error:
            reason = str(error)
            await self._kill(reason)
            return WindowResult(Outcome.TORN, reason, self._times)
        except BaseException as bug:
            # The controller ends by it, cancelled or by a bug, and nobody would ever resume the engine.
            await self._kill(f"the window was broken off: {bug!r}")
            raise

    async def _open(self) -> WindowResult:
        failpoints.hit("window.begin")
        begun = self._clock()
        paused = await self._pause()
        self._times.quiesce_ms = self._since(begun)
        if paused:
            return await self._close(Outcome.UNDONE, paused, self._before)
        failpoints.hit("window.paused")
        begun = self._clock()
        answers = await self._write()
        failpoints.hit("window.written")
        failed = refusals(answers) or self._unexpected(answers) or await self._commit()
        if failed:
            proof = await self._undo(failed)
            self._times.apply_ms = self._since(begun)
            return await self._close(Outcome.UNDONE, failed, proof)
        self._times.apply_ms = self._since(begun)
        return await self._close(Outcome.APPLIED, "", fingerprints(answers), tuple(answers))

    async def _pause(self) -> str:
        """Why the engine did not come to rest; empty when it did.

        Requests that do not drain in time are no torn engine: it answers the resume, or else that tears it.
        """
        try:
            await within(self._order.quiesce_deadline_s, "pause", self._engine.pause(self._order.mode))
        except (Unanswered, EngineFailed) as error:
            return f"the engine did not come to rest: {error}"
        return ""

    async def _write(self) -> list[Status]:
        deadline_s = self._order.apply_deadline_s
        if self._order.folder:
            return await call_ranks(self._engine, "hotweights_apply", deadline_s, self._order.folder)
        # The engine ran on the version that it leaves: its KV cache may hold what outlives the weights.
        return await call_ranks(self._engine, "hotweights_undo", deadline_s, {"clear_caches": True})

    def _unexpected(self, answers: list[Status]) -> str:
        """Why what is installed is not what was ordered, as far as that is known; or empty."""
        if not self._order.expected or fingerprints(answers) == self._order.expected:
            return ""
        return "the fingerprint differs from that of the same version when it was installed before"

    async def _commit(self) -> str:
        """Tags and caches; why they failed, or empty."""
        try:
            if self._order.mode != "keep" and not await self._reset_caches():
                return "a cache is still held by requests and would serve what the old weights computed"
            # Last: what is undone must not have been tagged.
            await within(RESUME_DEADLINE_S, "tagging", self._engine.set_weight_version(self._order.version))
        except EngineFailed as error:
            return str(error)
        return ""

    async def _reset_caches(self) -> bool:
        return await within(RESUME_DEADLINE_S, "resetting the caches", self._engine.reset_caches())

    async def _undo(self, failed: str) -> tuple[bytes, ...]:
        if not self._order.folder:
            raise Unproven(f"going back failed, and there is no way back from that: {failed}")
        if self._order.no_way_back:
            raise Unproven(f"{self._order.no_way_back}: {failed}")
        answers = await call_ranks(
            self._engine, "hotweights_undo", self._order.apply_deadline_s, {"clear_caches": False}
        )
        if failed := refusals(answers):
            raise Unproven(f"the undo failed: {failed}")
        if fingerprints(answers) != self._before:
            raise Unproven("the undo did not bring back what was served before")
        # The other modes dropped all blocks when they paused; these are of before an undo, which clears the memory.
        if self._order.mode == "keep" and not await self._reset_caches():
            raise Unproven("a cache is still held by requests after the undo")
        return self._before

    async def _close(
        self, outcome: Outcome, reason: str, proof: tuple[bytes, ...], answers: tuple[Status, ...] = ()
    ) -> WindowResult:
        begun = self._clock()
        salt = self._order.version if self._order.mode == "keep" and outcome is Outcome.APPLIED else ""
        resumed = await within(RESUME_DEADLINE_S, "resume", self._engine.resume(salt))
        self._times.resume_ms = self._since(begun)
        note = "" if resumed else "still paused, as its owner had left it"
        return WindowResult(outcome, reason, self._times, proof, answers, note)

    async def _kill(self, reason: str) -> None:
        try:
            self._engine.condemn(reason)
            if self._order.processes:
                await within(KILL_DEADLINE_S, "kill", self._engine.kill(self._order.processes, reason))
        except (Unanswered, EngineFailed):
            # It is dead already, or nothing more can be done from here: the outcome says torn either way.
            return

    def _since(self, begun: float) -> float:
        return (self._clock() - begun) * 1000.0


async def run_window(
    engine: Engine, order: WindowOrder, before: tuple[bytes, ...], clock: Callable[[], float] = time.monotonic
) -> WindowResult:
    """Opens one window and closes it."""
    return await Window(engine, order, before, clock).run()
