"""An engine's sleep, which belongs to its owner: nothing is read or written then, and nobody is woken.

awake --read(begin)--> kept awake while ranks read --read(end)--> awake
asleep --GO--> deferred --the owner wakes it--> window, before anything is scheduled
                  |
                  +-- a newer order, or the deadline --> EXPIRED, nothing was touched
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.worker_client.window.engine import Engine, EngineFailed
from hotweights.worker_client.window.window import Unanswered, drop_late, within

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 10.0
ASLEEP_DEADLINE_S = 3600.0
CALLED_BACK = "called back before its window was open"


class Sleep:
    """Of one engine. Use from the controller's loop only."""

    def __init__(
        self,
        engine: Engine,
        report: Callable[[pb.Report], None],
        is_torn: Callable[[], bool],
        orders_wait: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._report = report
        self._is_torn = is_torn
        self._orders_wait = orders_wait
        self._readers = 0
        self._newer = asyncio.Event()
        self.deferred: pb.Report | None = None
        """What a new leader is told: that GO was taken and waits for the wake-up."""

    def newer_order(self) -> None:
        """An order came: a window that waits for the wake-up is not wanted any longer."""
        self._newer.set()

    async def level(self) -> int:
        """0 is awake. Raises Unanswered, EngineFailed."""
        return await within(CALL_DEADLINE_S, "the engine", self._engine.read(self._readers > 0))

    @contextlib.asynccontextmanager
    async def kept_away(self) -> AsyncIterator[int]:
        """The sleep level; at 0 the engine stays awake inside. Raises Unanswered, EngineFailed."""
        self._readers += 1
        try:
            yield await self.level()
        finally:
            self._readers -= 1
            if not self._readers and not self._is_torn():
                await self._allow()

    async def _allow(self) -> None:
        try:
            await within(CALL_DEADLINE_S, "the engine", self._engine.read(False))
        except (EngineFailed, Unanswered) as error:
            log.warning("the engine was not told that its parameters are read no longer: %s", error)

    async def wait_for_wake(self, order: pb.Order, level: int) -> str:
        """Why it is waited for no longer; empty when it is awake, with what is scheduled held until `let_wake`."""
        deadline_s = order.apply.asleep_deadline_s or ASLEEP_DEADLINE_S
        self.defer(order, f"asleep at level {level}; its window opens when it wakes, within {deadline_s:.0f} s")
        wakes = asyncio.ensure_future(self._engine.await_wake())
        newer = asyncio.ensure_future(self._newer.wait())
        done, _ = await asyncio.wait({wakes, newer}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        newer.cancel()
        if wakes in done:
            wakes.result()
            return ""
        wakes.add_done_callback(drop_late)
        return CALLED_BACK if newer in done else f"still asleep after {deadline_s:.0f} s"

    def defer(self, order: pb.Order, reason: str) -> None:
        """Reports that the window of GO opens later; from now on a newer order calls it back."""
        log.info("%s: %s", order.update_id, reason)
        deferred = pb.Deferred(reason=reason)
        self.deferred = pb.Report(number=order.number, update_id=order.update_id, epoch=order.epoch, deferred=deferred)
        self._report(self.deferred)
        self._newer.clear()
        if self._orders_wait():
            self._newer.set()

    @property
    def called_back(self) -> bool:
        """Whether a window that was deferred is not wanted any longer."""
        return self.deferred is not None and self._newer.is_set()

    async def let_wake(self) -> None:
        """What was held goes on: at the latest when the engine gets to it, so nobody is the worse for no answer."""
        try:
            await within(CALL_DEADLINE_S, "the engine", self._engine.let_wake())
        except (EngineFailed, Unanswered) as error:
            log.warning("the engine was not told that no window is wanted on waking: %s", error)
