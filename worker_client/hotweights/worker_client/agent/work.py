"""Work that several callers wait for: one hash of a folder, one staging of an image.

Callers come and go; the work goes on while one of them waits, or always if it is `kept`. Its
figures are read by whoever wants to show them, at most four times a second.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

from hotweights.worker_client.stage.threads import Figures

T = TypeVar("T")

TELL_EVERY_S = 0.25


class OutOfTime(Exception):
    """The caller's deadline passed; the work itself may go on for others."""


class Work(Generic[T]):
    """A task with figures and a count of those who wait for it."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], figures: Figures, *, kept: bool) -> None:
        self.task: asyncio.Task[T] = asyncio.ensure_future(coroutine)
        self.task.add_done_callback(_retrieve)
        self.figures = figures
        self._kept = kept
        self._waiting = 0
        self._called_off = False

    @property
    def is_over(self) -> bool:
        """Ended, or about to: too late to join."""
        return self._called_off or self.task.done()

    async def follow(self, deadline_s: float) -> AsyncIterator[tuple[int, int]]:
        """Yields (bytes done, bytes in all) when they changed, until the work has ended; then `result` has it.

        Raises OutOfTime.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + deadline_s
        self._waiting += 1
        told: tuple[int, int] | None = None
        try:
            while not self.task.done():
                remaining_s = ends_at - loop.time()
                if remaining_s <= 0:
                    raise OutOfTime
                await asyncio.wait({self.task}, timeout=min(TELL_EVERY_S, remaining_s))
                now = self.figures.read()
                if now != told:
                    told = now
                    yield now
        finally:
            self._waiting -= 1
            if not self._waiting and not self._kept and not self.task.done():
                self._called_off = True
                self.task.cancel()

    async def result(self, deadline_s: float) -> T:
        """Waits for the work. Raises OutOfTime and what the work raised."""
        async for _ in self.follow(deadline_s):
            pass
        return self.task.result()


def _retrieve(task: "asyncio.Future[Any]") -> None:
    """An error nobody waited for is no surprise at exit: whoever asks next starts the work anew."""
    if not task.cancelled():
        task.exception()
