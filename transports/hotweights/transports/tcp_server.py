"""The serving side of the tcp transport: one task a connection, every wait with a limit.

A connection that sends nonsense is closed with one line in the log; the others notice nothing.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from hotweights.transports import frames
from hotweights.transports.base import BucketSource, TokenCheck, open_in_thread
from hotweights.transports.errors import NotHeld
from hotweights.transports.line import Line, NoTls, PlainLine, Tls, TlsLine

log = logging.getLogger(__name__)

T = TypeVar("T")

SEND_BYTES = 4 << 20
CLOSE_S = 5.0


@dataclass(frozen=True)
class Limits:
    """What a server puts up with."""

    connections_max: int = 256
    # From accepting a connection to its HELLO, the TLS handshake included.
    hello_s: float = 10.0
    # From one read to the next: a reader may verify what it got in between.
    idle_s: float = 120.0
    # For 4 MiB to leave: 140 KB/s at least.
    stall_s: float = 30.0


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
    ) -> None:
        self.address = address
        self._listener = listener
        self._source = source
        self._check = check
        self._limits = limits
        self._tls = tls
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
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
        for task, sock in list(self._connections.items()):
            _shut_down(sock)
            task.cancel()
        await asyncio.wait([self._accepting, *tasks], timeout=CLOSE_S)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, or the peer left again
                log.warning("%s: cannot accept a connection: %s", self.address, error)
                await asyncio.sleep(0.2)
                continue
            if len(self._connections) >= self._limits.connections_max:
                self._turn_away(sock)
                continue
            task = asyncio.create_task(self._serve_connection(sock, f"{peer[0]}:{peer[1]}"))
            self._connections[task] = sock
            task.add_done_callback(self._forget)

    def _turn_away(self, sock: socket.socket) -> None:
        log.warning("%s: turned a reader away: %d connections are open", self.address, len(self._connections))
        with sock:
            if self._tls is None:  # with TLS nothing can be said before a handshake, for which there is no room
                self._say(sock, frames.Why.BUSY, f"has {len(self._connections)} connections, its limit")

    def _say(self, sock: socket.socket, why: frames.Why, text: str) -> None:
        """Last words in plaintext."""
        try:
            sock.send(frames.refused(why, text))
        except OSError:  # it left, which is what it was to do
            log.debug("%s: the reader had left", self.address)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        del self._connections[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a connection failed in a way it must not", self.address, exc_info=error)

    async def _serve_connection(self, sock: socket.socket, peer: str) -> None:
        with sock:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line, token = await _within(self._limits.hello_s, self._welcome(sock))
                await self._send(line, memoryview(frames.frame(frames.Kind.WELCOME)))
                while not self._closing:
                    kind, body = await _within(self._limits.idle_s, frames.receive_frame(line))
                    await self._serve_read(line, token, frames.parse_read(kind, body))
            except (frames.Garbage, NoTls) as garbage:
                log.warning("%s: closed the connection of %s, which %s", self.address, peer, garbage)
                if isinstance(garbage, NoTls) and garbage.one_is_plain:
                    self._say(sock, frames.Why.TLS, "speaks no TLS" if self._tls is None else "speaks TLS only")
            except (frames.Ended, asyncio.TimeoutError, OSError) as error:
                log.debug("%s: the connection of %s ended: %s", self.address, peer, error or "too slow")

    async def _welcome(self, sock: socket.socket) -> tuple[Line, bytes]:
        """The line, and the token that it was opened with. Raises Garbage, Ended, OSError, NoTls."""
        line: Line = PlainLine(sock)
        if self._tls is not None:
            line = secure = TlsLine(sock, self._tls.server())
            await secure.shake_hands()
        kind, body = await frames.receive_frame(line)
        return line, frames.parse_hello(kind, body)

    async def _serve_read(self, line: Line, token: bytes, wish: frames.Read) -> None:
        if not self._check(token, wish.image):
            await self._send(line, memoryview(frames.refused(frames.Why.TOKEN)))
            return
        try:
            view = await open_in_thread(self._source, wish.image, wish.file, wish.offset, wish.size)
        except NotHeld as problem:
            await self._send(line, memoryview(frames.refused(frames.Why.NOT_HELD, problem.problem)))
            return
        with view:
            await self._send(line, memoryview(frames.data(wish.size)))
            for at in range(0, wish.size, SEND_BYTES):
                with view[at : at + SEND_BYTES] as part:
                    await self._send(line, part)

    async def _send(self, line: Line, part: memoryview) -> None:
        await _within(self._limits.stall_s, line.send(part))


async def _within(seconds: float, wait: Awaitable[T]) -> T:
    return await asyncio.wait_for(wait, seconds)


def _shut_down(sock: socket.socket) -> None:
    """Wakes whoever waits on the socket. Closing it under the event loop would confuse its selector."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more
        log.debug("the socket was shut already")
