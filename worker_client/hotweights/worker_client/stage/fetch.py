"""An image from other nodes into the stage: a few buckets at a time, from the best source that works.

    todo --source in order of preference--> received in place --hash right--> good
      ^                                          |
      +----- failed or wrong: next source -------+      a source that fails rests a while, then is out

A wrong bucket is asked of the same source once more (the way may have broken it), then of others.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hotweights.transports.base import Connection
from hotweights.transports.errors import NotHeld, TokenRefused, TransportError
from hotweights.v1.worker_service_pb2 import Source
from hotweights.worker_client.stage.errors import SourcesFailed
from hotweights.worker_client.stage.partial import Partial, Progress
from hotweights.worker_client.stage.threads import in_thread

log = logging.getLogger(__name__)

PARALLEL = 4
BUCKET_DEADLINE_S = 60.0
FAILURES_MAX = 5  # in a row
WRONG_MAX = 2  # times one bucket from one source
REST_S = 0.2  # after the first failure; doubles


Open = Callable[[Source], Awaitable[Connection]]


class WrongBytes(Exception):
    """A bucket came whole, and is another."""


@dataclass
class _Standing:
    """How a source has done lately."""

    failures: int = 0
    rests_until: float = 0.0
    out: bool = False
    why: str = ""


class Fetch:
    """One image's way here. `sources` may grow while it runs."""

    def __init__(
        self,
        partial: Partial,
        sources: list[Source],
        open_source: Open,
        progress: Progress,
        *,
        parallel: int = PARALLEL,
    ) -> None:
        self._partial = partial
        self._sources = sources
        self._open_source = open_source
        self._progress = progress
        self._parallel = parallel
        self._todo = deque(sorted(partial.missing))
        self._standings: dict[str, _Standing] = {}
        self._wrong: Counter[tuple[str, int]] = Counter()

    async def run(self) -> None:
        """Returns with nothing missing. Raises SourcesFailed. The caller's deadline is by cancelling."""
        workers = [asyncio.ensure_future(self._work()) for _ in range(min(self._parallel, len(self._todo)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            if workers:
                await asyncio.wait(workers)
        if self._partial.missing:
            raise SourcesFailed(self._partial.digest, self._reasons())

    async def _work(self) -> None:
        """Takes bucket after bucket, over one connection for as long as its source is the best."""
        connection: Connection | None = None
        used: Source | None = None
        try:
            while self._todo:
                index = self._todo.popleft()
                source = await self._choose(index)
                if source is None:
                    raise SourcesFailed(self._partial.digest, self._reasons())
                if connection is not None and used is not source:
                    await connection.close()
                    connection = None
                try:
                    if connection is None:
                        connection, used = await self._open_source(source), source
                    await self._receive(connection, source, index)
                except (TransportError, WrongBytes) as error:
                    self._todo.appendleft(index)
                    self._struck(source, error)
                    if connection is not None:
                        await connection.close()
                        connection = None
        finally:
            if connection is not None:
                await connection.close()

    async def _choose(self, index: int) -> Source | None:
        """The first source that may be asked for the bucket now; waits for one that rests if there is no other."""
        loop = asyncio.get_running_loop()
        while True:
            usable = [source for source in self._sources if self._may_give(source, index)]
            now = loop.time()
            for source in usable:
                if self._standing(source).rests_until <= now:
                    return source
            if not usable:
                return None
            await asyncio.sleep(min(self._standing(source).rests_until for source in usable) - now)

    def _may_give(self, source: Source, index: int) -> bool:
        return not self._standing(source).out and self._wrong[source.node_id, index] < WRONG_MAX

    async def _receive(self, connection: Connection, source: Source, index: int) -> None:
        bucket = self._partial.manifest.buckets[index]
        with self._partial.view(index) as place:
            await connection.read_into(
                self._partial.digest, bucket.file, bucket.offset, place, deadline_s=BUCKET_DEADLINE_S
            )
        if not await in_thread(lambda _: self._partial.matches(index)):
            self._wrong[source.node_id, index] += 1
            raise WrongBytes(f"bucket {index} came with wrong bytes")
        self._standing(source).failures = 0
        self._partial.mark_good(index)
        self._progress(self._partial.bytes_done, self._partial.bytes_total)

    def _struck(self, source: Source, error: Exception) -> None:
        standing = self._standing(source)
        standing.failures += 1
        standing.why = str(error)
        standing.out = isinstance(error, NotHeld | TokenRefused) or standing.failures >= FAILURES_MAX
        standing.rests_until = asyncio.get_running_loop().time() + REST_S * 2 ** (standing.failures - 1)
        log.warning("source %s: %s%s", source.node_id, error, "; given up" if standing.out else "")

    def _standing(self, source: Source) -> _Standing:
        return self._standings.setdefault(source.node_id, _Standing())

    def _reasons(self) -> list[str]:
        return [f"{node}: {standing.why}" for node, standing in self._standings.items() if standing.why]
