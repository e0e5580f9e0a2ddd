"""Blocking work beside the event loop that can be called off."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
Stop = Callable[[], bool]


async def in_thread(
    work: Callable[[Stop], T], pool: ThreadPoolExecutor | None = None, wake: Callable[[], object] = lambda: None
) -> T:
    """Runs `work(stop)` in a thread, of the loop's own pool where none is given.

    Cancelled, it makes `stop()` true, calls `wake` and waits until the thread has let go. So what the thread uses (a
    mapped file, say) may be closed afterwards.
    """
    stopped = threading.Event()
    running = asyncio.get_running_loop().run_in_executor(pool, work, stopped.is_set)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stopped.set()
        wake()
        await outlast(running)
        raise


async def outlast(work: "asyncio.Future[T]") -> None:
    """Waits until work that was called off has ended, however often who waits is called off himself."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # looked at: nobody else will


def drive(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing of the event loop, in a thread that has none."""
    while True:
        try:
            waits_for = work.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        if waits_for is not None:  # asyncio.sleep(0) gives None
            work.close()
            raise RuntimeError(f"waits for {waits_for!r}, and there is no event loop here")


class Spare:
    """Threads for work that may last: who finds none to spare does it another way."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)  # begun when they are needed
        self._spare = threading.BoundedSemaphore(count)

    async def run(self, work: Callable[[Stop], object], wake: Callable[[], object]) -> bool:
        """As in_thread; False at once where no thread is to spare."""
        if not self._spare.acquire(blocking=False):
            return False

        def hold(stop: Stop) -> None:
            try:
                work(stop)
            finally:
                self._spare.release()

        await in_thread(hold, self._pool, wake)
        return True
