"""Blocking work beside the event loop that can be called off."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class CalledOff(Exception):
    """Nobody waits for the work any longer."""


def stoppable(progress: Callable[[int, int], None], stop: Callable[[], bool]) -> Callable[[int, int], None]:
    """`progress` for blocking work that ends with CalledOff once `stop()` is true."""

    def step(bytes_done: int, bytes_total: int) -> None:
        if stop():
            raise CalledOff
        progress(bytes_done, bytes_total)

    return step


class Figures:
    """Bytes done and in all; written by threads, read by the loop."""

    def __init__(self) -> None:
        self._now = (0, 0)

    def write(self, bytes_done: int, bytes_total: int) -> None:
        self._now = (bytes_done, bytes_total)  # one assignment: readers see a whole pair

    def read(self) -> tuple[int, int]:
        return self._now


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Runs `work(stop)` in a thread. Cancelled, it makes `stop()` true and waits until the thread has let go.

    So what the thread uses (a mapped file, say) may be closed afterwards.
    """
    stopped = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, stopped.is_set))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stopped.set()
        await outlast(running)
        raise


async def outlast(work: "asyncio.Future[T]") -> None:
    """Waits until work that was called off has ended, however often who waits is called off himself."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # looked at: nobody else will
