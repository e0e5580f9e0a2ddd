"""The serving side of the tcp transport: one task a connection, every wait with a limit.

    accepted: a stranger --its first read shows a good token--> a reader
              few, fewer of one host, and for seconds only      connections_max

A connection that sends nonsense is closed with one line in the log, and one whose token is refused at once; the others
notice nothing. Strangers never take a reader's place: beyond their limits the oldest of the host with the most goes.
"""

import asyncio
import logging
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from hotweights.transports import frames
from hotweights.transports.base import BucketSource, FileRange, TokenCheck, in_memory, open_shortest
from hotweights.transports.errors import NotHeld, NotYet
from hotweights.transports.line import Line, NoTls, PlainLine, Tls, TlsLine
from hotweights.transports.mpi_lane import MpiLane, MpiOver
from hotweights.transports.pace import Pace
from hotweights.transports.ucx_lane import Endpoint, Lane

log = logging.getLogger(__name__)

T = TypeVar("T")

# Called with a host, "" for none, and what a log is to say of it. A stranger can cause it as often as he likes.
Warn = Callable[[str, str], None]

SEND_BYTES = 4 << 20
CLOSE_S = 5.0


@dataclass(frozen=True)
class Limits:
    """What a server puts up with."""

    # Of readers: whose token was good.
    connections_max: int = 256
    # Of strangers. A reader is one for as long as a handshake and two small frames take.
    strangers_max: int = 64
    strangers_of_one_host_max: int = 16
    # From accepting a connection to its HELLO, the TLS handshake included; and from there to its first read.
    hello_s: float = 10.0
    # From one read to the next: a reader may verify what it got in between.
    idle_s: float = 120.0
    # For 4 MiB to leave: 140 KB/s at least.
    stall_s: float = 30.0


@dataclass(eq=False)
class Peer:
    """The other end of a connection."""

    sock: socket.socket
    host: str
    name: str
    is_reader: bool = False
    is_cut: bool = False  # about to end
    lane: Endpoint | None = None  # over which his bytes go, where he has joined over UCX


def log_all(host: str, text: str) -> None:
    """A Warn for those who are not exposed to strangers."""
    log.warning("%s", text)


class TcpServer:
    """See base.Server. Made by TcpTransport.serve."""

    def __init__(
        self,
        listener: socket.socket,
        address: str,
        source: BucketSource,
        check: TokenCheck,
        limits: Limits,
        tls: Tls | None = None,
        warn: Warn = log_all,
        pace: Pace | None = None,
        lane: Lane | None = None,
        mpi: MpiLane | None = None,
    ) -> None:
        """Readers that have UCX get their bytes over `lane`, where there is one; those of the same MPI job by `mpi`."""
        self.address = address
        self._listener = listener
        self._source = source
        self._check = check
        self._limits = limits
        self._tls = tls
        self._warn = warn
        self._pace = pace or Pace()
        self._lane = lane
        self._can = frames.Can.DELTAS | frames.Can.LOCATE
        if lane is not None:
            self._can |= frames.Can.UCX
        self._mpi = mpi
        if mpi is not None:
            self._can |= frames.Can.CAST
        self._connections: dict[asyncio.Task[None], Peer] = {}  # oldest first
        self._closing = False
        self._accepting = asyncio.create_task(self._accept(), name=f"accept {address}")

    @property
    def connection_count(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._accepting.cancel()
        tasks = list(self._connections)
        for task in tasks:
            self._cut(task)
        await asyncio.wait([self._accepting, *tasks], timeout=CLOSE_S)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, or the peer left again
                self._warn("", f"{self.address}: cannot accept a connection: {error}")
                await asyncio.sleep(0.2)
                continue
            host = str(peer[0])
            if self._is_full():
                with sock:
                    self._turn_away(sock, host)
                continue
            self._make_room(host)
            there = Peer(sock, host, f"{host}:{peer[1]}")
            task = asyncio.create_task(self._serve_connection(there))
            self._connections[task] = there
            task.add_done_callback(self._forget)

    def _is_full(self) -> bool:
        return sum(peer.is_reader for peer in self._connections.values()) >= self._limits.connections_max

    def _turn_away(self, sock: socket.socket, host: str) -> None:
        self._warn(host, f"{self.address}: turned {host} away: {len(self._connections)} connections are open")
        if self._tls is None:  # with TLS nothing can be said before a handshake, for which there is no room
            self._say(sock, frames.Why.BUSY, f"has {len(self._connections)} connections, its limit")

    def _make_room(self, host: str) -> None:
        """For one more stranger, of this host."""
        strangers = {task: peer for task, peer in self._connections.items() if not (peer.is_reader or peer.is_cut)}
        hosts = Counter(peer.host for peer in strangers.values())
        if hosts[host] >= self._limits.strangers_of_one_host_max:
            crowded = host
        elif len(strangers) >= self._limits.strangers_max:
            crowded = hosts.most_common(1)[0][0]
        else:
            return
        oldest, peer = next((task, peer) for task, peer in strangers.items() if peer.host == crowded)
        self._turn_away(peer.sock, peer.host)
        self._cut(oldest)

    def _cut(self, task: "asyncio.Task[None]") -> None:
        self._connections[task].is_cut = True
        _shut_down(self._connections[task].sock)
        task.cancel()

    def _say(self, sock: socket.socket, why: frames.Why, text: str) -> None:
        """Last words in plaintext."""
        try:
            sock.send(frames.refused(why, text))
        except OSError:  # it left, which is what it was to do
            log.debug("%s: the reader had left", self.address)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._connections.pop(task).sock.close()  # one that was cut before it began has not done so itself
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a connection failed in a way it must not", self.address, exc_info=error)

    async def _serve_connection(self, peer: Peer) -> None:
        sock = peer.sock
        with sock:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line, token = await _within(self._limits.hello_s, self._welcome(sock))
                await self._send(line, memoryview(frames.welcome(self._can)))
                while not self._closing:
                    wait_s = self._limits.idle_s if peer.is_reader else self._limits.hello_s
                    await asyncio.sleep(0)  # what is there is received and sent without waiting: others get their turn
                    kind, body = await _within(wait_s, frames.receive_frame(line))
                    wish = frames.parse_wish(kind, body)
                    if (why := self._refusal(peer, token, wish)) is not None:
                        await self._send(line, memoryview(frames.refused(why)))
                        return
                    if isinstance(wish, frames.Join):
                        await self._join(peer, line, wish, token)
                    elif isinstance(wish, frames.Locate):
                        place = await asyncio.to_thread(self._source.locate, wish.image, wish.file)
                        await self._send(line, memoryview(frames.located(place)))
                    else:
                        await self._serve_read(peer, line, wish)
            except (frames.Garbage, NoTls) as garbage:
                self._warn(peer.host, f"{self.address}: closed the connection of {peer.name}, which {garbage}")
                if isinstance(garbage, NoTls) and garbage.one_is_plain:
                    self._say(sock, frames.Why.TLS, "speaks no TLS" if self._tls is None else "speaks TLS only")
            except (frames.Ended, asyncio.TimeoutError, OSError) as error:
                log.debug("%s: the connection of %s ended: %s", self.address, peer.name, error or "too slow")
            finally:
                if peer.lane is not None:
                    await peer.lane.close()

    async def _welcome(self, sock: socket.socket) -> tuple[Line, bytes]:
        """The line, and the token that it was opened with. Raises Garbage, Ended, OSError, NoTls."""
        line: Line = PlainLine(sock)
        if self._tls is not None:
            line = secure = TlsLine(sock, self._tls.server())
            await secure.shake_hands()
        kind, body = await frames.receive_frame(line)
        return line, frames.parse_hello(kind, body)

    def _refusal(self, peer: Peer, token: bytes, wish: frames.Wish) -> frames.Why | None:
        """Why the connection ends instead of the read. None makes a reader of a stranger."""
        if not self._check(token, wish.image):
            return frames.Why.TOKEN
        if not peer.is_reader and self._is_full():
            return frames.Why.BUSY
        peer.is_reader = True
        return None

    async def _join(self, peer: Peer, line: Line, wish: frames.Join, token: bytes) -> None:
        """Only here does UCX see anything that comes from outside: of who has shown a good token."""
        if self._lane is None or peer.lane is not None:
            raise frames.Garbage("asks for UCX, which it was not offered")
        address = frames.parse_sealed(wish.sealed, token)
        peer.lane = await _within(self._limits.hello_s, self._lane.endpoint(address))
        await self._send(line, memoryview(frames.joined(self._lane.address, token)))

    async def _serve_read(self, peer: Peer, line: Line, wish: frames.Read) -> None:
        if wish.tag is not None and peer.lane is None:
            raise frames.Garbage("asks for bytes over UCX and has not joined")
        try:
            found = await open_shortest(self._source, wish.image, wish.file, wish.offset, wish.size, wish.base)
        except NotHeld as problem:
            await self._send(line, memoryview(frames.refused(frames.Why.NOT_HELD, problem.problem)))
            return
        except NotYet as problem:
            await self._send(line, memoryview(frames.refused(frames.Why.NOT_YET, str(problem.held_bytes))))
            return
        piece = min(SEND_BYTES, self._pace.piece_bytes or SEND_BYTES)
        if isinstance(found, FileRange) and wish.job is None and wish.tag is None and line.sends_files:
            with found:
                await self._send(line, memoryview(frames.data(found.nbytes)))
                for at in range(0, found.nbytes, piece):
                    size = min(piece, found.nbytes - at)
                    await self._pace.take(size)
                    await _within(self._limits.stall_s, line.send_file(found.handle, found.offset + at, size))
            return
        view = in_memory(found)
        if wish.job is not None and (number := await self._cast(wish, view)) is not None:
            await self._send(line, memoryview(frames.cast(number)))
            return
        if wish.tag is not None and peer.lane is not None:
            await self._send(line, memoryview(frames.data_tagged(len(view), piece)))
            for at in range(0, len(view), piece):
                part = view[at : at + piece]  # not released: UCX may hold it longer than we wait
                await self._pace.take(len(part))
                await _within(self._limits.stall_s, peer.lane.send(part, wish.tag))
            return
        with view:
            await self._send(line, memoryview(frames.data(len(view))))
            for at in range(0, len(view), piece):
                with view[at : at + piece] as part:
                    await self._pace.take(len(part))
                    await self._send(line, part)
                    await asyncio.sleep(0)

    async def _cast(self, wish: frames.Read, view: memoryview) -> int | None:
        """In which broadcast a bucket went to the whole job; None where that is not the reader's, or hangs."""
        if self._mpi is None or self._mpi.job != wish.job or self._mpi.trouble:
            return None
        bucket = (wish.image, wish.file, wish.offset, wish.size)
        charged = len(view) if self._mpi.is_new(bucket) else 0
        await self._pace.take(charged)
        try:
            return await self._mpi.cast(bucket, view[:])  # MPI may hold it longer than we wait
        except MpiOver:
            self._pace.give_back(charged)
            return None

    async def _send(self, line: Line, part: memoryview) -> None:
        await _within(self._limits.stall_s, line.send(part))


async def _within(seconds: float, wait: Awaitable[T]) -> T:
    """Raises asyncio.TimeoutError."""
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(wait, seconds)
    async with asyncio.timeout(seconds):  # without a task of its own
        return await wait


def _shut_down(sock: socket.socket) -> None:
    """Wakes whoever waits on the socket. Closing it under the event loop would confuse its selector."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more
        log.debug("the socket was shut already")
