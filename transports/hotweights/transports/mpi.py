"""MPI: frames go over TCP as in tcp.py, whole buckets by broadcast to all agents of one job (mpirun, Slurm).

    reader                                      source
    READ_CAST --tcp--> the same port as tcp's -->  broadcasts the bucket, once, whoever asks first
    what came for this image is kept        <====
                       <-- CAST, in which -----
    ... and takes from it what it asks for next, before it asks

So an image crosses the publisher's link once and each node's once, in the time of a broadcast. A reader that came
later, or is of another job, gets its bytes over TCP, and so does everybody while a broadcast hangs or when the job is
over. Deltas are asked for over TCP: they are small, and one node's are not another's.
"""

import asyncio

from hotweights.transports import frames
from hotweights.transports.line import Line
from hotweights.transports.mpi_lane import KEPT_BYTES_MAX, MpiLane
from hotweights.transports.pace import Pace
from hotweights.transports.tcp import TcpConnection, TcpTransport, check_size
from hotweights.transports.tcp_server import Limits, Warn, log_all

# From hearing that a bucket was broadcast until it is here too.
ARRIVE_S = 10.0
BROADCAST = "mpi"


class MpiConnection(TcpConnection):
    """See base.Connection. Made by MpiTransport.connect."""

    _in_threads = False

    def __init__(self, line: Line, address: str, can: frames.Can, lane: MpiLane) -> None:
        super().__init__(line, address, can, BROADCAST)
        self._lane = lane
        self._images: set[bytes] = set()

    async def _ask(self, wish: frames.Read, into: memoryview) -> int:
        if wish.base is not None:
            self.way = "tcp (deltas go to whom they are for)"
        elif len(into) > KEPT_BYTES_MAX:
            self.way = "tcp (too large a bucket to be kept)"
        elif trouble := self._lane.trouble:
            self.way = f"tcp ({trouble})"
        else:
            return await self._ask_all(wish, into)
        return await super()._ask(wish, into)

    async def _ask_all(self, wish: frames.Read, into: memoryview) -> int:
        """What was asked for before us, or by us, has come to all."""
        lane, bucket = self._lane, (wish.image, wish.file, wish.offset, wish.size)
        if wish.image not in self._images:
            self._images.add(wish.image)
            lane.want(wish.image)
        came = lane.take(bucket)
        if came is None:
            await self._line.send(frames.read_cast(lane.job, *bucket))
            kind, body = await self._answer(wish)
            if kind is frames.Kind.DATA:
                self.way = "tcp (the source is in another MPI job, or its own hangs)"
                size = check_size(frames.parse_data(kind, body), wish)
                await frames.receive_into(self._line, into[:size], midway=True)
                return size
            if await lane.reached(frames.parse_cast(kind, body), ARRIVE_S):
                came = lane.take(bucket)
        if came is None:
            self.way = "tcp (it was broadcast before this node asked)"
            return await super()._ask(wish, into)
        self.way = BROADCAST
        with memoryview(came) as whole:
            for at in range(0, len(into), frames.YIELD_BYTES):
                into[at : at + frames.YIELD_BYTES] = whole[at : at + frames.YIELD_BYTES]
                await asyncio.sleep(0)
        return wish.size

    @property
    def origin(self) -> str:
        return BROADCAST if self.way == BROADCAST else ""

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        """Whoever broadcast it is not always the source that was asked; a bucket that went by comes no second time."""
        return origin == BROADCAST

    def _drop(self) -> None:
        super()._drop()
        while self._images:
            self._lane.done(self._images.pop())


class MpiTransport(TcpTransport):
    """See base.Transport. Addresses are those of tcp, whose readers are served too."""

    name = "mpi"

    def __init__(
        self, lane: MpiLane, limits: Limits | None = None, warn: Warn = log_all, pace: Pace | None = None
    ) -> None:
        super().__init__(limits, None, warn, pace)
        self._mpi = lane

    def _connection(self, line: Line, address: str, can: frames.Can, token: bytes) -> TcpConnection:
        assert self._mpi is not None
        if frames.Can.CAST not in can:
            return TcpConnection(line, address, can, "tcp (the source is in no MPI job)")
        return MpiConnection(line, address, can, self._mpi)
