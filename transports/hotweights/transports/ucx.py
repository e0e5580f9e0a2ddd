"""UCX: frames go over TCP as in tcp.py, bytes over whatever UCX has between the two nodes (RDMA, shared memory, TCP).

    reader                                         source
    hello, token --tcp--> the same port as tcp's --> says whether it has UCX too
    JOIN, READ_TAGGED --tcp--------------------->   opens the range
    memory of this connection <--UCX, by pieces--   from where it lies
      --copied--> the reader's memory

So who may read, for how long, how many and what is refused is as with tcp; UCX is handed nothing from who has not
shown a good token. It cannot be made to let go of memory into which a peer that hangs may still write: it gets some of
its own, which stays registered with the network card, and what has come is copied.
"""

import asyncio
import itertools
import secrets
import time
from collections import deque

from hotweights.transports import frames
from hotweights.transports.errors import PeerGone
from hotweights.transports.line import Line
from hotweights.transports.pace import Pace
from hotweights.transports.tcp import TcpConnection, TcpTransport, check_size
from hotweights.transports.tcp_server import Limits, Warn, log_all
from hotweights.transports.ucx_lane import Endpoint, Lane

# Pieces that a connection has memory for: one is copied while the next comes.
AHEAD = 2
# After which UCX is tried again where it did not come through and tcp does.
AGAIN_S = 600.0


class UcxConnection(TcpConnection):
    """See base.Connection. Made by UcxTransport.connect."""

    _in_threads = False

    def __init__(
        self, line: Line, address: str, can: frames.Can, lane: Lane, token: bytes, unreached: dict[str, float]
    ) -> None:
        """`unreached` is told when UCX did not come through to which address."""
        super().__init__(line, address, can, "ucx")
        self._lane = lane
        self._unreached = unreached
        self._has_received = False
        self._token = token
        self._endpoint: Endpoint | None = None
        # One of ours at a time, and no other connection's: whoever may send to this process could else guess it.
        self._tags = itertools.count(secrets.randbits(62))
        self._memory: list[bytearray] = []
        self._closing: set[asyncio.Task[None]] = set()

    async def _ask(self, wish: frames.Read, into: memoryview) -> int:
        endpoint = self._endpoint or await self._join(wish)
        tag = next(self._tags)
        await self._line.send(frames.read_tagged(wish.image, wish.file, wish.offset, wish.size, wish.base, tag))
        size, piece = frames.parse_data_tagged(*await self._answer(wish))
        check_size(size, wish)
        receiving = asyncio.ensure_future(self._receive(endpoint, into[:size], piece, tag))
        # Nothing comes here while bytes come there, but the end of a source that died.
        ending = asyncio.ensure_future(self._line.receive_some(memoryview(bytearray(1))))
        try:
            await asyncio.wait((receiving, ending), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
                self._has_received = True
                return size
            if ending.result():
                raise frames.Garbage("sends something in the middle of a transfer")
            raise frames.Ended(midway=True)
        finally:
            if not self._has_received:  # nor would another connection there
                self._unreached[self._address] = time.monotonic()
            for task in (receiving, ending):
                task.cancel()
            await asyncio.wait((receiving, ending))
            for task in (receiving, ending):
                if not task.cancelled():
                    task.exception()  # it was looked at above, or there is a better one

    async def _join(self, wish: frames.Read) -> Endpoint:
        await self._line.send(frames.join(wish.image, self._lane.address, self._token))
        try:
            there = frames.parse_joined(*await self._answer(wish), self._token)
            self._endpoint = await self._lane.endpoint(there)
        except (frames.Ended, frames.Garbage, OSError):
            self._unreached[self._address] = time.monotonic()
            raise
        return self._endpoint

    async def _receive(self, endpoint: Endpoint, into: memoryview, piece: int, tag: int) -> None:
        """Piece after piece, AHEAD of them asked for at once. Called off, it does not touch `into` any more."""
        piece = min(piece, len(into))
        memory = [*self._memory, *(bytearray(piece) for _ in range(AHEAD - len(self._memory)))]
        self._memory = [room if len(room) >= piece else bytearray(piece) for room in memory]
        asked: deque[tuple[int, int, bytearray, asyncio.Task[None]]] = deque()
        try:
            for number, at in enumerate(range(0, len(into), piece)):
                if len(asked) == AHEAD:
                    await self._take(asked, into)
                room, size = self._memory[number % AHEAD], min(piece, len(into) - at)
                asked.append((at, size, room, asyncio.ensure_future(endpoint.receive(room, size, tag))))
            while asked:
                await self._take(asked, into)
        finally:
            for _, _, _, task in asked:
                task.cancel()

    @staticmethod
    async def _take(asked: "deque[tuple[int, int, bytearray, asyncio.Task[None]]]", into: memoryview) -> None:
        at, size, room, task = asked[0]
        await task
        asked.popleft()
        into[at : at + size] = memoryview(room)[:size]

    def _drop(self) -> None:
        super()._drop()
        if self._endpoint is not None:
            self._memory = []  # a transfer that was cut off may still write to it
            task = asyncio.ensure_future(self._endpoint.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._endpoint = None


class UcxTransport(TcpTransport):
    """See base.Transport. Addresses are those of tcp, whose readers are served too."""

    name = "ucx"

    def __init__(
        self,
        lane: Lane,
        limits: Limits | None = None,
        warn: Warn = log_all,
        pace: Pace | None = None,
        *,
        fall_back: bool = False,
    ) -> None:
        """With `fall_back` sources that have no UCX, or that it does not reach, are read over tcp.

        Without, they are gone for us.
        """
        super().__init__(limits, None, warn, pace)
        self._lane: Lane = lane
        self._fall_back = fall_back
        self._unreached: dict[str, float] = {}

    def _connection(self, line: Line, address: str, can: frames.Can, token: bytes) -> TcpConnection:
        failed_at = self._unreached.get(address, -AGAIN_S)
        reaches = not self._fall_back or time.monotonic() - failed_at >= AGAIN_S
        if frames.Can.UCX in can and reaches:
            return UcxConnection(line, address, can, self._lane, token, self._unreached)
        if self._fall_back:
            why = "the source has no UCX" if reaches else "UCX did not come through to the source"
            return TcpConnection(line, address, can, f"tcp ({why})")
        line.close()
        raise PeerGone(address, "has no UCX, and HOTWEIGHTS_TRANSPORT is ucx here")
