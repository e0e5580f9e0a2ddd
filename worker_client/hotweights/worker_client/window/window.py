"""The window: pause, apply, resume, prove; every wait with a deadline, every failure with an end.

                          validity over       a rank not ok, a cache not reset
    order --> EXPIRED <--- [pause] ---> [apply] ---------------> [undo] --> [resume] --> [prove] --> UNDONE
                              |            |  \\                    |                       |
                              |            |   +-> [tag, reset, resume] --> [prove] ------- | -----> APPLIED
                              |            |                        |          |            |
                              |            |                        |  another fingerprint: |
                              |            |                        |  pause, undo, resume, prove
                              +- no answer +- no answer, not ok ----+------- not proven ----+--> kill the engine: TORN

In the pause every rank reads back what it wrote; the whole of it is fingerprinted after the engine has resumed.

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
    version_before: str = ""
    """What outputs are tagged with again when the window goes back after it has resumed."""
    expected: tuple[bytes, ...] = ()
    """Fingerprints the ranks must have afterwards; empty ones are not known."""
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
    prove_ms: float = 0.0
    """After the pause."""


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


class NoProof(Exception):
    """The ranks cannot be fingerprinted for now, and nothing is wrong: the engine sleeps, or it takes too long."""


Prove = Callable[[], Awaitable[tuple[bytes, ...]]]
"""The fingerprints of all ranks while they serve. Raises NoProof, EngineFailed, Unproven."""


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


def differ(found: tuple[bytes, ...], expected: tuple[bytes, ...]) -> bool:
    """Whether a rank has another fingerprint than is known of it."""
    return any(known and known != there for there, known in zip(found, expected, strict=False))


def refusals(answers: list[Status]) -> str:
    """Why ranks are not ok; empty when all are."""
    return "; ".join(f"rank {answer['rank']}: {answer['reason']}" for answer in answers if not answer["ok"])


def fingerprints(answers: list[Status], which: str = "fingerprint") -> tuple[bytes, ...]:
    """In the order of the ranks."""
    return tuple(bytes(answer[which]) for answer in sorted(answers, key=lambda answer: int(answer["rank"])))


class Window:
    """One window on one engine. `before` is what the ranks proved to serve when they prepared."""

    def __init__(
        self, engine: Engine, order: WindowOrder, before: tuple[bytes, ...], prove: Prove, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._order = order
        self._before = before
        self._prove = prove
        self._clock = clock
        self._times = Times()
        self._paused = False

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
            # The controller ends by it, cancelled or by a bug, and nobody would ever resume a paused engine.
            if self._paused:
                await self._kill(f"the window was broken off: {bug!r}")
            raise

    async def _open(self) -> WindowResult:
        failpoints.hit("window.begin")
        begun = self._clock()
        paused = await self._pause()
        self._times.quiesce_ms = self._since(begun)
        if paused:
            await self._resume("")
            return WindowResult(Outcome.UNDONE, paused, self._times, self._before)
        failpoints.hit("window.paused")
        begun = self._clock()
        answers = await self._write()
        failpoints.hit("window.written")
        failed = refusals(answers) or await self._commit(self._order.version)
        if failed:
            await self._undo(failed, clear_caches=False)
        self._times.apply_ms = self._since(begun)
        note = await self._resume(self._order.version if self._order.mode == "keep" and not failed else "")
        if failed:
            return await self._undone(failed)
        failpoints.hit("window.resumed")
        return await self._applied(answers, note)

    async def _applied(self, answers: list[Status], note: str) -> WindowResult:
        """The engine serves what was written: proves the whole of it, or takes it back."""
        begun, failed = self._clock(), ""
        proof: tuple[bytes, ...] = ()
        try:
            proof = await self._prove()
            if differ(proof, self._order.expected):
                failed = "the fingerprint is another than that of the version it is to serve"
        except NoProof as error:
            note = "; ".join(filter(None, (note, f"not all of it was fingerprinted: {error}")))
        except EngineFailed as error:
            failed = f"the engine cannot be fingerprinted: {error}"
        self._times.prove_ms = self._since(begun)
        if failed:
            return await self._take_back(failed)
        return WindowResult(Outcome.APPLIED, "", self._times, proof, tuple(answers), note)

    async def _take_back(self, failed: str) -> WindowResult:
        """A second pause: the engine has run on what could not be proven."""
        self._paused = True
        await within(self._order.quiesce_deadline_s, "pause", self._engine.pause("recompute"))
        await self._undo(failed, clear_caches=True)
        if failed_again := await self._commit(self._order.version_before):
            raise Unproven(f"{failed}; going back: {failed_again}")
        await self._resume("")
        return await self._undone(failed)

    async def _undone(self, failed: str) -> WindowResult:
        begun, note = self._clock(), ""
        try:
            if self._before and await self._prove() != self._before:
                raise Unproven(f"the undo did not bring back what was served before: {failed}")
        except NoProof as error:
            note = f"not all of it was fingerprinted: {error}"
        self._times.prove_ms += self._since(begun)
        return WindowResult(Outcome.UNDONE, failed, self._times, self._before, note=note)

    async def _pause(self) -> str:
        """Why the engine did not come to rest; empty when it did.

        Requests that do not drain in time are no torn engine: it answers the resume, or else that tears it.
        """
        self._paused = True
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

    async def _commit(self, version: str) -> str:
        """Tags and caches; why they failed, or empty."""
        try:
            if self._order.mode != "keep" and not await self._reset_caches():
                return "a cache is still held by requests and would serve what the old weights computed"
            # Last: what is undone must not have been tagged.
            await within(RESUME_DEADLINE_S, "tagging", self._engine.set_weight_version(version))
        except EngineFailed as error:
            return str(error)
        return ""

    async def _reset_caches(self) -> bool:
        return await within(RESUME_DEADLINE_S, "resetting the caches", self._engine.reset_caches())

    async def _undo(self, failed: str, *, clear_caches: bool) -> None:
        """In every rank; each reads back what it put back. Raises Unproven when one cannot."""
        if not self._order.folder:
            raise Unproven(f"going back failed, and there is no way back from that: {failed}")
        if self._order.no_way_back:
            raise Unproven(f"{self._order.no_way_back}: {failed}")
        deadline_s = self._order.apply_deadline_s
        answers = await call_ranks(self._engine, "hotweights_undo", deadline_s, {"clear_caches": clear_caches})
        if refused := refusals(answers):
            raise Unproven(f"the undo failed: {refused}")
        # The other modes dropped all blocks when they paused; these are of before an undo, which clears the memory.
        if self._order.mode == "keep" and not await self._reset_caches():
            raise Unproven("a cache is still held by requests after the undo")

    async def _resume(self, salt: str) -> str:
        """A note for who watches, or empty."""
        begun = self._clock()
        resumed = await within(RESUME_DEADLINE_S, "resume", self._engine.resume(salt))
        self._paused = False
        self._times.resume_ms += self._since(begun)
        return "" if resumed else "still paused, as its owner had left it"

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
    engine: Engine,
    order: WindowOrder,
    before: tuple[bytes, ...],
    prove: Prove,
    clock: Callable[[], float] = time.monotonic,
) -> WindowResult:
    """Opens one window and closes it."""
    return await Window(engine, order, before, prove, clock).run()
