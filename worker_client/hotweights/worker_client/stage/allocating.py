"""Room for an image's files, taken in a thread ahead of what is received into them.

Taking all of it first would be time in which nothing comes, the more the larger the image is.
"""

import asyncio

from hotweights.transports.threads import in_thread, outlast
from hotweights.worker_client.stage.partial import Partial
from hotweights.worker_client.stage.stage import Stage


class Allocating:
    """Begins when it is made; `close` it. On one event loop."""

    def __init__(self, stage: Stage, partial: Partial) -> None:
        self._partial = partial
        self._loop = asyncio.get_running_loop()
        self._advanced = asyncio.Event()
        self._work = asyncio.ensure_future(in_thread(lambda stop: stage.allocate(partial, self._tell, stop)))
        self._work.add_done_callback(lambda _: self._advance())

    async def of(self, index: int) -> None:
        """Returns when bucket `index` may be received. Raises StageFull, OSError."""
        while True:
            if self._work.done():
                self._work.result()  # where there is no room for all of it, none of it need come
            if self._partial.has_room(index):
                return
            await self._advanced.wait()

    async def all(self) -> None:
        """Returns when there is room for everything. Raises StageFull, OSError."""
        await asyncio.shield(self._work)

    async def close(self) -> None:
        """Nothing is taken any more. Raises nothing."""
        self._work.cancel()
        await outlast(self._work)

    def _tell(self) -> None:
        """In the thread."""
        self._loop.call_soon_threadsafe(self._advance)

    def _advance(self) -> None:
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()
