"""MPI in this process: buckets go by broadcast to all agents of one job (mpirun, Slurm).

    rank r                rank 0                     every rank
    WANT, bucket   ---->  the order of all of them
                          HEAD, whose, bucket  ====> by broadcast
    its bytes      ==================================> by broadcast: kept where somebody here asked for its image

One thread of each rank does everything that is MPI, and nothing else does. Ranks of a job trust each other: what is
sent goes to all, and a rank that dies ends the job, which is MPI's way. A job ends for all when one of its agents ends
in good order; those that go on have no MPI then, and say so.
"""

import asyncio
import importlib
import logging
import mmap
import secrets
import struct
import threading
import time
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from typing import Any

from hotweights.transports.errors import TransportMissing
from hotweights.transports.frames import JOB_BYTES

log = logging.getLogger(__name__)

# What has come for connections here and was not read yet: they ask for buckets in about the order of all others.
KEPT_BYTES_MAX = 256 << 20
# Of which buckets it is known that they were sent to all: not again for one that is late.
SENT_MAX = 1 << 17
# A broadcast that takes longer, for each of its MiB beside, holds nobody any more: a rank hangs.
STUCK_S, STUCK_S_PER_MIB = 5.0, 0.1
START_S, END_S = 60.0, 5.0
# Where a job ends, a rank that is told so is mostly about to end as well.
CLOSING_S = 1.0
_BUSY_S, _NAP_S, _SLEEP_S = 0.05, 5e-5, 2e-3
HANGS = "an MPI broadcast hangs"
_WANT_TAG = 7
_WANT, _HEAD = struct.Struct("!B32sIQQ"), struct.Struct("!BI32sIQQ")
_CAST, _OVER = 1, 2

Bucket = tuple[bytes, int, int, int]
"""Image, file, offset, size."""
_NONE: Bucket = (bytes(32), 0, 0, 0)


class MpiOver(Exception):
    """The job has ended for this rank, or something in it hangs; tcp is there all the same."""


class MpiLane:
    """This process's rank. Use from one event loop; make it, and `close` it, in any thread."""

    def __init__(self, module: Any) -> None:
        """`module` is mpi4py.MPI, not initialised. Waits for the other ranks of the job. Raises TransportMissing."""
        self.job = b""
        self.rank, self.size = 0, 1
        self.casts = 0
        """Broadcasts that have ended here."""
        self._mpi = module
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._mine: OrderedDict[Bucket, tuple[memoryview, asyncio.Future[int]]] = OrderedDict()
        self._wanted: Counter[bytes] = Counter()
        self._kept: dict[Bucket, mmap.mmap] = {}
        self._kept_bytes = 0
        self._sent: OrderedDict[Bucket, int] = OrderedDict()
        self._asked: deque[tuple[int, Bucket]] = deque()
        self._news = asyncio.Event()
        self._busy_until = 0.0
        self._hangs = False
        self._is_over = False
        self._closing = threading.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(ready,), name="mpi", daemon=True)
        self._thread.start()
        if not ready.wait(START_S):
            raise TransportMissing(
                "mpi", known=("tcp",), reason=f"has waited {START_S:g} s for the other ranks of its job"
            )

    # On the event loop.

    @property
    def trouble(self) -> str:
        """Why nothing goes by broadcast at this time; empty where it does."""
        if self._is_over:
            return "the MPI job is over"
        if self.size < 2:
            return "alone in its MPI job"
        until = self._busy_until
        return HANGS if self._hangs or (until and time.monotonic() > until) else ""

    def want(self, image: bytes) -> None:
        """From now on what comes of it is kept, until as many have said that they are `done`."""
        self._loop = asyncio.get_running_loop()
        with self._lock:
            self._wanted[image] += 1

    def done(self, image: bytes) -> None:
        with self._lock:
            self._wanted[image] -= 1
            if self._wanted[image] <= 0:
                del self._wanted[image]
                for bucket in [bucket for bucket in self._kept if bucket[0] == image]:
                    self._drop(bucket)

    def take(self, bucket: Bucket) -> mmap.mmap | None:
        """What came of a bucket; it is the caller's then."""
        with self._lock:
            return self._drop(bucket)

    def is_new(self, bucket: Bucket) -> bool:
        """Whether it neither went to all, by whichever rank, nor is about to from here."""
        with self._lock:
            return bucket not in self._sent and bucket not in self._mine

    async def cast(self, bucket: Bucket, view: memoryview) -> int:
        """Sends it to all ranks, unless it was already; by the number of which broadcast. Raises MpiOver."""
        self._loop = asyncio.get_running_loop()
        with self._lock:
            if (number := self._sent.get(bucket)) is not None:
                return number
            if self.trouble:
                raise MpiOver(self.trouble)
            if bucket not in self._mine:
                self._mine[bucket] = view, self._loop.create_future()  # settled by the thread alone
                self._asked.append((_CAST, bucket))
            _, sent = self._mine[bucket]
        await asyncio.wait({sent}, timeout=_stuck_s(bucket))
        if sent.done():
            return sent.result()
        with self._lock, suppress(ValueError):  # where rank 0 has heard of it already, it still goes to all
            self._hangs = True
            self._asked.remove((_CAST, bucket))
            del self._mine[bucket]
        raise MpiOver(HANGS)

    async def reached(self, number: int, deadline_s: float) -> bool:
        """Waits until a broadcast has ended here too; whether it has."""
        self._loop = loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_s
        while self.casts < number and not self._is_over:
            news, left_s = self._news, ends - loop.time()
            if left_s <= 0:
                return False
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), left_s)
        return self.casts >= number

    def close(self) -> None:
        """Ends the job for all its ranks, which are tcp's from then on. Waits END_S at most."""
        self._closing.set()
        self._thread.join(END_S)

    # In the thread, which owns everything of MPI.

    def _live(self, ready: threading.Event) -> None:
        mpi = self._mpi
        mpi.Init_thread(mpi.THREAD_FUNNELED)
        self._comm = comm = mpi.COMM_WORLD
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        job = bytearray(secrets.token_bytes(JOB_BYTES))
        comm.Bcast([job, mpi.BYTE], root=0)
        self.job = bytes(job)
        ready.set()
        try:
            self._lead() if self.rank == 0 else self._follow()
        finally:
            with self._lock:
                self._is_over = True
                left = list(self._mine.values())
                self._mine.clear()
            for _, sent in left:
                self._call(_settle, sent, MpiOver("the MPI job is over"))
            self._call(self._wake)
        # It keeps the interpreter until all ranks are in it, and whoever launched them kills who has not ended soon.
        self._closing.wait(CLOSING_S)
        mpi.Finalize()  # all are here: an end was told to everybody

    def _lead(self) -> None:
        """Of rank 0: takes wishes, its own too, in the order in which they come."""
        status, order, idle_since = self._mpi.Status(), deque[tuple[int, int, Bucket]](), time.monotonic()
        while True:
            while self._asked:
                order.append((0, *self._asked.popleft()))
            while self._comm.Iprobe(source=self._mpi.ANY_SOURCE, tag=_WANT_TAG, status=status):
                order.append((status.Get_source(), *self._hear(status.Get_source())))
            if not order and self._closing.is_set():
                order.append((0, _OVER, _NONE))
            if not order:
                self._rest(idle_since)
                continue
            root, kind, bucket = order.popleft()
            self._share(bytearray(_HEAD.pack(kind, root, *bucket)), 0)
            if kind == _OVER:
                return
            self._move(root, bucket)
            idle_since = time.monotonic()

    def _hear(self, rank: int) -> tuple[int, Bucket]:
        wish = bytearray(_WANT.size)
        self._comm.Recv([wish, self._mpi.BYTE], source=rank, tag=_WANT_TAG)
        kind, image, file, offset, size = _WANT.unpack(wish)
        return kind, (image, file, offset, size)

    def _follow(self) -> None:
        """Of the others: does what rank 0 says, and tells it what is wanted here."""
        told_over = False
        while True:
            head = bytearray(_HEAD.size)
            coming, idle_since = self._comm.Ibcast([head, self._mpi.BYTE], root=0), time.monotonic()
            while not coming.Test():
                if self._asked or (self._closing.is_set() and not told_over):
                    kind, bucket = self._asked.popleft() if self._asked else (_OVER, _NONE)
                    told_over = told_over or kind == _OVER
                    wish = _WANT.pack(kind, *bucket)  # small: it leaves without its receiver
                    self._comm.Send([wish, self._mpi.BYTE], dest=0, tag=_WANT_TAG)
                self._rest(idle_since)
            kind, root, image, file, offset, size = _HEAD.unpack(head)
            if kind == _OVER:
                return
            self._move(root, (image, file, offset, size))

    def _move(self, root: int, bucket: Bucket) -> None:
        """One bucket from a rank to all others."""
        self._busy_until = time.monotonic() + _stuck_s(bucket)
        room = None if root == self.rank else mmap.mmap(-1, bucket[3])  # which clears nothing while others wait
        self._share(self._mine[bucket][0] if room is None else room, root)
        with self._lock:
            self._busy_until, self._hangs = 0.0, False
            self._sent[bucket] = number = self.casts + 1
            if len(self._sent) > SENT_MAX:
                self._sent.popitem(last=False)
            if room is None:
                self._call(_settle, self._mine.pop(bucket)[1], number)
            elif bucket[0] in self._wanted:
                self._keep(bucket, room)
            self.casts = number
        self._call(self._wake)

    def _share(self, memory: Any, root: int) -> None:
        """A broadcast. Not by MPI's own waiting, which would take a core for as long as a rank hangs."""
        moving, begun = self._comm.Ibcast([memory, self._mpi.BYTE], root=root), time.monotonic()
        while not moving.Test():
            self._rest(begun)

    def _keep(self, bucket: Bucket, memory: mmap.mmap) -> None:
        """What came first is asked for first: where there is no room, what comes now is let go."""
        self._drop(bucket)
        if self._kept_bytes + len(memory) <= KEPT_BYTES_MAX:
            self._kept[bucket] = memory
            self._kept_bytes += len(memory)

    def _drop(self, bucket: Bucket) -> mmap.mmap | None:
        memory = self._kept.pop(bucket, None)
        self._kept_bytes -= 0 if memory is None else len(memory)
        return memory

    def _rest(self, since: float) -> None:
        """MPI moves only while it is called: often at first, then seldom."""
        time.sleep(_NAP_S if time.monotonic() - since < _BUSY_S else _SLEEP_S)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _call(self, call: Any, *arguments: Any) -> None:
        if self._loop is None:
            return
        with suppress(RuntimeError):  # it is closed: nobody waits
            self._loop.call_soon_threadsafe(call, *arguments)


def _settle(sent: "asyncio.Future[int]", outcome: int | MpiOver) -> None:
    if isinstance(outcome, MpiOver):
        sent.set_exception(outcome)
        sent.exception()  # looked at, should nobody wait any longer
    else:
        sent.set_result(outcome)


def _stuck_s(bucket: Bucket) -> float:
    return STUCK_S + STUCK_S_PER_MIB * bucket[3] / (1 << 20)


_lane: MpiLane | None = None


def open_lane() -> MpiLane:
    """The process's one. Waits for the other ranks of its job. Raises TransportMissing."""
    global _lane
    if _lane is None:
        try:
            package = importlib.import_module("mpi4py")
        except ImportError as error:
            raise TransportMissing("mpi", "mpi", reason="needs mpi4py, which is not installed") from error
        package.rc.initialize = package.rc.finalize = False  # the thread does both
        try:
            module = importlib.import_module("mpi4py.MPI")
        except (ImportError, RuntimeError) as error:
            raise TransportMissing("mpi", known=("tcp",), reason=f"finds no MPI library: {error}") from error
        _lane = MpiLane(module)
    return _lane


def close_lane() -> None:
    """At the end of the process, where there is one."""
    if _lane is not None:
        _lane.close()
