"""An image from other nodes into the stage: a few buckets at a time, from the best source that works.

    todo --source in order of preference--> received in place --hash right--> good    (the next is received meanwhile)
      ^                                          |
      +----- failed or wrong: next source -------+      a source that fails rests a while, then is out

A source that is staging the image itself is waited for as long as it gets more of it: so every node of a chain takes
from the one before it, and the publisher sends the image about once. One that gets nothing for STALL_S rests like one
that fails. A wrong bucket is asked of the same source once more (the way may have broken it); whoever sends
WRONG_MAX of them is a liar, and out.

Where this node has the version before, deltas to it are asked for: a source that has it too sends what changed. One
whose deltas do not fit is asked for plain buckets.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from hotweights.transports.base import Connection, ThreadConnection
from hotweights.transports.errors import NotHeld, NotYet, TokenRefused, TransportError
from hotweights.transports.pace import Pace
from hotweights.transports.threads import in_thread, outlast
from hotweights.v1 import manifest_pb2
from hotweights.v1.worker_service_pb2 import Source, SourceLeft
from hotweights.worker_client.stage.base import Base
from hotweights.worker_client.stage.errors import SourcesFailed
from hotweights.worker_client.stage.partial import Partial, Progress
from hotweights.worker_client.stage.run import Came, Run, came_of

log = logging.getLogger(__name__)

PARALLEL = 2  # buckets on their way at once: as many are between one node of a chain and the next
STALL_S = 5.0
SLOW_RATE = 2e6  # bytes a second of a link on which a source is given longer than STALL_S for a few buckets
LINGER_S = 5.0  # a connection that is not used for longer is closed
RATE_MIN = 200e3  # bytes a second of one bucket, below which its source is left;
BUCKET_DEADLINE_S = 30.0  # not before this: many flows on one link are not equally lucky
HASHED_HERE_BYTES = 512 << 10  # 0.15 ms: a thread takes longer to hear of it
ASK_AGAIN_S = 0.05  # of who has not begun
FAILURES_MAX = 5  # in a row
NO_FIT_MAX = 2  # sources whose deltas do not fit
LEFT_MAX = 64
WRONG_MAX = 2  # buckets of one source
REST_S = 0.2  # after the first failure; doubles


Open = Callable[[Source], Awaitable[Connection]]
# Image, base, bucket; and the delta that made the one of the other there.
Received = Callable[[bytes, bytes, manifest_pb2.Bucket, bytes], None]


class Stalled(Exception):
    """A source that is staging the image itself gets no further."""


class WrongBytes(Exception):
    """A bucket came whole, and is another."""


@dataclass
class Tally:
    """What a fetch tells of itself while it runs."""

    source: str = ""
    """The node that gave the last bucket."""
    way: str = ""
    """How it came: the transport, and why it is that one."""
    bytes_per_s: float = 0.0
    """Of what was fetched, by the clock here, from the first bucket that was asked for."""
    wire_bytes: int = 0
    """What was right of what came over the wire: less than the image where deltas came."""
    left: list[SourceLeft] = field(default_factory=list)
    """Sources that are not asked any longer, or not for a while; LEFT_MAX at most."""


@dataclass
class _Standing:
    """How a source has done lately."""

    way: tuple[str, bytes]
    """Where it was, and what was shown to it."""
    failures: int = 0
    rests_until: float = 0.0
    out: bool = False
    why: str = ""
    held_bytes: int = -1
    grew_at: float = 0.0
    """When it was seen to get more of the image: of one that is staging it."""


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
        pace: Pace | None = None,
        tally: Tally | None = None,
        room: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """`room` returns when a bucket may be received; it is there where none is given."""
        self._partial = partial
        self._sources = sources
        self._open_source = open_source
        self._progress = progress
        self._base: Base | None = None
        self._received: Received | None = None
        self._parallel = parallel
        self._pace = pace or Pace()
        self._tally = tally or Tally()
        self._room = room
        self._fetched_bytes = 0
        self._begun_at = 0.0
        self._todo = deque(sorted(partial.missing))
        self._standings: dict[str, _Standing] = {}
        self._wrong: Counter[str] = Counter()
        self._no_deltas: set[str] = set()
        self._lock = threading.Lock()  # of the tally, and of what is told: never less than before
        self._broken: set[Connection] = set()
        """Over which wrong bytes came: it may be the way, so no more is asked for there."""

    def ask_deltas(self, base: Base | None, received: Received) -> None:
        """To `base`, where there is one; `received` hears of each that was right."""
        self._base, self._received = base, received

    async def run(self) -> None:
        """Returns with nothing missing. Raises SourcesFailed. The caller's deadline is by cancelling."""
        self._begun_at = time.monotonic()
        workers = [asyncio.ensure_future(self._work()) for _ in range(min(self._parallel, len(self._todo)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            for worker in workers:
                await outlast(worker)
        if self._partial.missing:
            raise SourcesFailed(self._partial.digest, self._reasons())

    async def _work(self) -> None:
        """Takes bucket after bucket, over one connection for as long as its source is the best."""
        connection: Connection | None = None
        used: Source | None = None
        judging: asyncio.Task[None] | None = None
        try:
            while self._todo or judging is not None:
                if judging is not None and (judging.done() or not self._todo):
                    await judging  # what was wrong is to do again
                    judging = None
                    continue
                if (index := await self._next()) is None:
                    continue
                size = self._partial.manifest.buckets[index].size_bytes
                source = await self._choose()
                if source is None:
                    if judging is not None:
                        await judging
                    raise SourcesFailed(self._partial.digest, self._reasons())
                connection = await self._keep(connection, size, is_its=used is source)
                base = self.base_for(index, source)
                taken = 0 if base is not None else size  # of a delta it is not known before how little comes
                await self._pace.take(taken)  # before the connection, which a source does not keep for who asks late
                run: Run | None = None
                try:
                    if connection is None:
                        connection, used = await self._open_source(source), source
                    run = Run(self, self._partial, connection, source, index)
                    if await self._run_in_thread(run, connection):
                        continue
                    came = await self._receive(connection, source, index, base)
                    if judging is not None:
                        await judging
                    judging = asyncio.ensure_future(self._judge(came))
                except (NotYet, NotHeld) as error:
                    self._todo.extendleft([index] if run is None else run.not_come)
                    self._pace.give_back(taken)
                    await self._wait_for(source, error)
                except TransportError as error:
                    self._todo.extendleft([index] if run is None else run.not_come)
                    self._struck(source, error)
                    if connection is not None:
                        await connection.close()
                        connection = None
        finally:
            if judging is not None:
                judging.cancel()
                await outlast(judging)
            if connection is not None:
                await connection.close()

    async def _keep(self, connection: Connection | None, size: int, *, is_its: bool) -> Connection | None:
        """The connection if it is worth asking there, of the source that was chosen; else it is closed."""
        if is_its and connection not in self._broken and self._pace.delay_s(size) <= LINGER_S:
            return connection
        if connection is not None:
            await connection.close()
        return None

    async def _run_in_thread(self, run: Run, connection: Connection) -> bool:
        """The bucket and those after it; False where that is not possible. Raises TransportError."""
        if self._pace.piece_bytes is not None or not isinstance(connection, ThreadConnection):
            return False
        try:
            return await connection.in_thread(run.go_on)
        finally:
            for came in run.wrong:
                self._refuse(came)

    async def _next(self) -> int | None:
        """A bucket, when there is room for it; None where another worker took the last one."""
        index = self._pop()
        if index is not None and self._room is not None:
            await self._room(index)
        return index

    def next_now(self) -> int | None:
        """A bucket that may be received at once. Thread-safe."""
        index = self._pop()
        if index is None or self._room is None or self._partial.has_room(index):
            return index
        self._todo.appendleft(index)
        return None

    def _pop(self) -> int | None:
        """Thread-safe."""
        try:
            return self._todo.popleft()
        except IndexError:
            return None

    async def _choose(self) -> Source | None:
        """The first source that may be asked now; waits for one that rests if there is no other."""
        while True:
            usable = [source for source in self._sources if not self._is_out(source)]
            now = time.monotonic()
            for source in usable:
                if self._standing(source).rests_until <= now:
                    return source
            if not usable:
                return None
            await asyncio.sleep(min(self._standing(source).rests_until for source in usable) - now)

    def _is_out(self, source: Source) -> bool:
        return self._standing(source).out or self._wrong[source.node_id] >= WRONG_MAX

    async def _receive(self, connection: Connection, source: Source, index: int, base: Base | None) -> Came:
        """Asks for a delta to `base`, where there is one. Raises TransportError."""
        bucket = self._partial.manifest.buckets[index]
        with self._partial.view(index) as place:
            size = await connection.read_into(
                *(self._partial.digest, bucket.file, bucket.offset, place),
                deadline_s=self.deadline_s(index),
                base=None if base is None else base.digest,
            )
            came = came_of(index, source, connection, size, base, place)
        if base is not None:
            await self._pace.take(size)
        return came

    def deadline_s(self, index: int) -> float:
        return max(BUCKET_DEADLINE_S, self._partial.manifest.buckets[index].size_bytes / RATE_MIN)

    async def _judge(self, came: Came) -> None:
        """Whether what came is the bucket."""
        bucket = self._partial.manifest.buckets[came.index]
        if bucket.size_bytes <= HASHED_HERE_BYTES and came.delta is None:
            right = self._is_right(came)
        else:
            right = await in_thread(lambda _: self._is_right(came))
        if right:
            self.take(came)
        else:
            self._refuse(came)

    def _refuse(self, came: Came) -> None:
        """Of a bucket that is wrong: it is to do again."""
        bucket = self._partial.manifest.buckets[came.index]
        self._todo.appendleft(came.index)
        node = came.source.node_id
        if came.delta is not None:
            log.warning("bucket %d, from %s: a delta that does not fit", came.index, node)
            self._no_deltas.add(node)
            if len(self._no_deltas) >= NO_FIT_MAX:  # it is rather ours that is another than it says
                self._base = None
        elif came.connection.doubt(self._partial.digest, bucket.file, came.origin):
            log.warning(
                "bucket %d, from %s: wrong bytes by %s, not its own; it is asked itself", came.index, node, came.way
            )
        elif came.connection in self._broken:
            log.warning("bucket %d, from %s: wrong bytes over the same connection; asked again", came.index, node)
        else:
            self._broken.add(came.connection)
            self._wrong[node] += 1
            self._struck(came.source, WrongBytes(f"bucket {came.index} came with wrong bytes"))

    def take(self, came: Came) -> None:
        """Of a bucket that is right. Thread-safe."""
        bucket = self._partial.manifest.buckets[came.index]
        if came.base is not None and came.delta is not None and self._received is not None:
            self._received(self._partial.digest, came.base.digest, bucket, came.delta)
        now = time.monotonic()
        with self._lock:
            standing = self._standing(came.source)
            standing.failures, standing.grew_at = 0, now
            self._fetched_bytes += bucket.size_bytes
            self._tally.wire_bytes += came.size
            self._tally.way, self._tally.source = came.way, came.source.node_id
            self._tally.bytes_per_s = self._fetched_bytes / max(now - self._begun_at, 1e-3)
            self._partial.mark_good(came.index)
            self._progress(self._partial.bytes_done, self._partial.bytes_total)

    def base_for(self, index: int, source: Source) -> Base | None:
        """To what a delta of a bucket may be asked of a source."""
        base = self._base  # which may go meanwhile
        if base is None or source.node_id in self._no_deltas:
            return None
        return base if base.has_place_of(self._partial.manifest.buckets[index]) else None

    def _is_right(self, came: Came) -> bool:
        """Whether what came is the bucket, or its delta makes it. In any thread."""
        if came.base is not None and came.delta is not None:
            return came.base.rebuild(self._partial, came.index, came.delta)
        return self._partial.matches(came.index)

    async def _wait_for(self, source: Source, error: NotYet | NotHeld) -> None:
        """Of a source that does not have a bucket: whether it may be asked again soon, later or never."""
        standing, now = self._standing(source), time.monotonic()
        if isinstance(error, NotHeld) and not source.staging:
            self._struck(source, error)
            return
        held_bytes = error.held_bytes if isinstance(error, NotYet) else 0
        if held_bytes > self._partial.bytes_total:
            self._struck(source, Stalled(f"says that it has {held_bytes} bytes of {self._partial.bytes_total}"))
        elif standing.held_bytes < 0 or self._is_growth(standing.held_bytes, held_bytes):
            standing.held_bytes, standing.grew_at = held_bytes, now
        elif now - standing.grew_at > self._stall_s:
            if held_bytes:
                self._struck(source, Stalled(f"has got nothing of the image for {self._stall_s:g} s"))
            else:  # it has not begun, which is nobody's failure: others are asked for a while
                standing.rests_until = now + self._stall_s
            standing.grew_at = standing.rests_until  # when it is asked again it has as long again
        await asyncio.sleep(ASK_AGAIN_S)

    def _is_growth(self, before: int, held_bytes: int) -> bool:
        """By a bucket at least, or to the end: one that only says a little more each time is waited for no longer."""
        step = min(self._partial.manifest.bucket_bytes, self._partial.bytes_total - before)
        return held_bytes > before and held_bytes - before >= step

    @property
    def _stall_s(self) -> float:
        """Of a healthy source on a slow link a few large buckets take longer than STALL_S."""
        return max(STALL_S, 2 * PARALLEL * self._partial.manifest.bucket_bytes / SLOW_RATE)

    def _struck(self, source: Source, error: Exception) -> None:
        standing = self._standing(source)
        was_out = standing.out
        standing.failures += 1
        standing.why = str(error)
        lied = self._wrong[source.node_id] >= WRONG_MAX
        standing.out = isinstance(error, NotHeld | TokenRefused) or standing.failures >= FAILURES_MAX or lied
        standing.rests_until = time.monotonic() + REST_S * 2 ** (standing.failures - 1)
        log.warning("source %s: %s%s", source.node_id, error, "; given up" if standing.out else "")
        is_news = not was_out and (standing.out or isinstance(error, Stalled))
        if is_news and len(self._tally.left) < LEFT_MAX:
            left = SourceLeft(source_node_id=source.node_id, reason=standing.why, lied=lied)
            self._tally.left.append(left)

    def _standing(self, source: Source) -> _Standing:
        """One whose agent was started again, at another place or with another token, begins anew."""
        way = source.data_endpoint, source.token
        standing = self._standings.get(source.node_id)
        if standing is None or standing.way != way:
            standing = self._standings[source.node_id] = _Standing(way)
        return standing

    def _reasons(self) -> list[str]:
        return [f"{node}: {standing.why}" for node, standing in self._standings.items() if standing.why]
