"""Plain TCP: bytes go from the source's memory to the reader's with no copy of ours in between.

Over TLS where contexts are given, with OpenSSL in between. Loopback unless told otherwise. The first frame carries
a token; see frames.py for the rest.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from hotweights.transports import frames
from hotweights.transports.address import format_address, parse_address
from hotweights.transports.base import BucketSource, Place, Reads, TokenCheck, check_range, check_token
from hotweights.transports.errors import DeadlinePassed, NotHeld, NotYet, PeerGone, TlsFailed, TokenRefused
from hotweights.transports.line import Late, Line, NoTls, PlainLine, Tls, TlsLine
from hotweights.transports.mpi_lane import MpiLane
from hotweights.transports.pace import Pace
from hotweights.transports.tcp_server import Limits, TcpServer, Warn, log_all
from hotweights.transports.threads import Spare, Stop, drive
from hotweights.transports.ucx_lane import Lane

T = TypeVar("T")

# Each reads over one connection; the other connections of a process go over the event loop.
THREADS_MAX = 16
SEND_S = 10.0  # for a wish to go out: a few bytes
_THREADS = Spare(THREADS_MAX, "hotweights-read")

LISTEN = "127.0.0.1:0"
BACKLOG = 128
_ANY = ("0.0.0.0", "::")


class TcpConnection:
    """See base.Connection and base.ThreadConnection. Made by TcpTransport.connect."""

    _in_threads = True
    """Whether reading waits for nothing but the line."""

    def __init__(self, line: Line, address: str, can: frames.Can, way: str = "tcp") -> None:
        self.way = way
        self._line = line
        self._address = address
        self._can = can
        self._turn = asyncio.Lock()
        self._closed = False

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        wish = self.wish(image, file, offset, into.nbytes, base)
        try:
            return await asyncio.wait_for(self._in_turn(lambda: self._ask(wish, into.cast("B"))), deadline_s)
        except asyncio.TimeoutError:
            raise DeadlinePassed(self._address, "reading", deadline_s) from None

    async def _in_turn(self, ask: Callable[[], Awaitable[T]]) -> T:
        """One question and its answer, after those before it."""
        async with self._turn:
            if self._closed:
                raise PeerGone(self._address, "the connection is closed")
            whole = False
            try:
                with self._in_words():
                    answer = await ask()
                whole = True
                return answer
            except (NotHeld, NotYet):
                whole = True
                raise
            finally:
                # Between two frames no longer, for whatever reason: nothing read later would be right.
                if not whole or self._closed:
                    self._drop()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """What may go wrong with the line is raised as a TransportError."""
        try:
            yield
        except NoTls as error:
            raise TlsFailed(self._address, str(error)) from error
        except (frames.Ended, frames.Garbage, OSError) as error:
            raise PeerGone(self._address, str(error)) from error

    async def in_thread(self, work: Callable[[Reads, Stop], object]) -> bool:
        """See base.ThreadConnection."""
        if not self._in_threads:
            return False
        async with self._turn:
            if self._closed:
                raise PeerGone(self._address, "the connection is closed")
            reads = _Reads(self)
            try:
                return await _THREADS.run(lambda stop: work(reads, stop), self._interrupt)
            finally:
                if reads.due or self._closed:
                    self._drop()

    def wish(self, image: bytes, file: int, offset: int, size: int, base: bytes | None) -> frames.Read:
        check_range(image, offset, size, base)
        return frames.Read(image, file, offset, size, base if frames.Can.DELTAS in self._can else None)

    def block(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """In a thread: the same as on the loop, on a line that blocks. Raises TransportError."""
        before = self._line.block_until(time.monotonic() + deadline_s)
        try:
            with self._in_words():
                return drive(work)
        except Late:
            raise DeadlinePassed(self._address, "reading", deadline_s) from None
        finally:
            self._line.block_until(before)

    def _interrupt(self) -> None:
        """Whoever waits in a thread wakes up; nothing is read here any more."""
        self._closed = True
        with suppress(OSError):  # not connected any more, which wakes as well
            self._line.shut_down()

    async def locate(self, image: bytes, file: int, *, deadline_s: float) -> Place | None:
        """Where the source says that others find a file themselves. Raises TransportError."""
        if frames.Can.LOCATE not in self._can:
            return None
        wish = frames.Locate(image, file)
        try:
            return await asyncio.wait_for(self._in_turn(lambda: self._ask_place(wish)), deadline_s)
        except asyncio.TimeoutError:
            raise DeadlinePassed(self._address, "asking where a file is", deadline_s) from None

    async def _ask_place(self, wish: frames.Locate) -> Place | None:
        await self._line.send(frames.locate(wish.image, wish.file))
        return frames.parse_located(*await self._answer(frames.Read(wish.image, wish.file, 0, 0)))

    async def _ask(self, wish: frames.Read, into: memoryview) -> int:
        """One read, and its answer: how many bytes came. Raises TransportError, Garbage, Ended, OSError, NoTls."""
        await self.send(wish)
        return await self.receive(wish, into)

    async def send(self, wish: frames.Read) -> None:
        await self._line.send(frames.read(wish.image, wish.file, wish.offset, wish.size, wish.base))

    async def receive(
        self, wish: frames.Read, into: memoryview, came: Callable[[memoryview], object] | None = None
    ) -> int:
        size = check_size(frames.parse_data(*await self._answer(wish)), wish)
        await frames.receive_into(self._line, into[:size], midway=True, came=came if size == wish.size else None)
        return size

    async def _answer(self, wish: frames.Read) -> tuple[frames.Kind, bytes]:
        """Raises what it is refused with, and as _ask."""
        kind, body = await frames.receive_frame(self._line)
        if kind is frames.Kind.REFUSED:
            raise self._refusal(body, wish.image, wish.file, wish.offset, wish.size)
        return kind, body

    def _refusal(self, body: bytes, image: bytes, file: int, offset: int, size: int) -> Exception:
        why, text = frames.parse_refused(body)
        if why is frames.Why.TOKEN:
            return TokenRefused(self._address, image)
        if why is frames.Why.NOT_HELD:
            return NotHeld(image, file, offset, size, text)
        if why is frames.Why.NOT_YET:
            return NotYet(image, frames.parse_held(text))
        if why is frames.Why.BUSY:
            return PeerGone(self._address, "has too many readers")
        raise frames.Garbage("refuses the connection in the middle of it")

    @property
    def origin(self) -> str:
        return ""

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        return False

    async def close(self) -> None:
        if self._closed:
            return
        if not self._turn.locked():
            self._drop()
            return
        self._interrupt()  # the read under way finds the end, and closes the socket itself

    def _drop(self) -> None:
        self._closed = True
        self._line.close()


class _Reads:
    """See base.Reads."""

    def __init__(self, connection: TcpConnection) -> None:
        self._connection = connection
        self.due: deque[frames.Read] = deque()
        """What was asked for and is not known to have come: the connection is between two frames if there is none."""

    def ask(self, image: bytes, file: int, offset: int, size: int, base: bytes | None = None) -> None:
        wish = self._connection.wish(image, file, offset, size, base)
        self.due.append(wish)
        self._connection.block(self._connection.send(wish), SEND_S)

    def take(self, into: memoryview, *, deadline_s: float, came: Callable[[memoryview], object] | None = None) -> int:
        try:
            size = self._connection.block(self._connection.receive(self.due[0], into.cast("B"), came), deadline_s)
        except (NotHeld, NotYet):
            self.due.popleft()
            raise
        self.due.popleft()
        return size


def check_size(size: int, wish: frames.Read) -> int:
    """What a source says it sends. Raises Garbage where that was not asked for."""
    if size != wish.size and (wish.base is None or not 0 < size < wish.size):
        raise frames.Garbage("sends another number of bytes than were asked for")
    return size


class TcpTransport:
    """See base.Transport. Addresses are HOST:PORT; port 0 at `listen` lets the system pick one."""

    name = "tcp"

    def __init__(
        self,
        limits: Limits | None = None,
        tls: Tls | None = None,
        warn: Warn = log_all,
        pace: Pace | None = None,
        why: str = "",
    ) -> None:
        """With `tls` everything is over TLS, and nothing in plaintext; without it, the reverse.

        `warn` hears of what strangers do to servers: every time. `pace` limits what all servers send. `why` is
        told of its connections: why it is this transport.
        """
        self._limits = limits or Limits()
        self._tls = tls
        self._warn = warn
        self._pace = pace
        self._way = self.name + (" over TLS" if tls else "") + (f" ({why})" if why else "")
        self._lane: Lane | None = None
        self._mpi: MpiLane | None = None

    async def serve(
        self, source: BucketSource, listen: str = LISTEN, *, check: TokenCheck, advertise: str | None = None
    ) -> TcpServer:
        host, port = parse_address(listen)
        if host in _ANY and advertise is None:
            raise ValueError(f"listening at {listen}, which is every address: say which one to advertise")
        loop = asyncio.get_running_loop()
        family, kind, protocol, _, target = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
            listener.listen(BACKLOG)
            bound = listener.getsockname()[1]
            address = _advertised(advertise, host, bound)
        except BaseException:  # whatever it is, the port is free again; raised on
            listener.close()
            raise
        return TcpServer(
            *(listener, address, source, check, self._limits, self._tls, self._warn, self._pace, self._lane, self._mpi)
        )

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> TcpConnection:
        check_token(token)
        try:
            line, can = await asyncio.wait_for(_dial(address, token, self._tls), deadline_s)
            return self._connection(line, address, can, token)
        except asyncio.TimeoutError:
            raise DeadlinePassed(address, "connecting", deadline_s) from None
        except NoTls as error:
            raise TlsFailed(address, str(error)) from error
        except (frames.Ended, frames.Garbage, OSError) as error:
            raise PeerGone(address, str(error)) from error

    def _connection(self, line: Line, address: str, can: frames.Can, token: bytes) -> TcpConnection:
        return TcpConnection(line, address, can, self._way)


def _advertised(advertise: str | None, host: str, bound: int) -> str:
    """The bound port takes the place of port 0, and of none at all."""
    if advertise is None:
        return format_address(host, bound)
    try:
        told, port = parse_address(advertise)
    except ValueError:
        told, port = parse_address(f"{advertise}:0")
    return format_address(told, port or bound)


async def _dial(address: str, token: bytes, tls: Tls | None) -> tuple[Line, frames.Can]:
    loop = asyncio.get_running_loop()
    host, port = parse_address(address)
    error: OSError = OSError("the name has no address")
    for family, kind, protocol, _, target in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, target)
        except OSError as failed:
            sock.close()
            error = failed
            continue
        except BaseException:  # cancelled too; raised on
            sock.close()
            raise
        return await _greet(sock, host, address, token, tls)
    raise error


async def _greet(
    sock: socket.socket, host: str, address: str, token: bytes, tls: Tls | None
) -> tuple[Line, frames.Can]:
    try:
        line = PlainLine(sock)
        if tls is not None:
            line = secure = TlsLine(sock, tls.client(), server_name=host)
            await secure.shake_hands()
        await line.send(frames.hello(token))
        kind, body = await frames.receive_frame(line)
        if kind is frames.Kind.REFUSED:
            why, text = frames.parse_refused(body)
            raise TlsFailed(address, text) if why is frames.Why.TLS else PeerGone(address, text)
        can = frames.parse_welcome(kind, body)
    except BaseException:  # cancelled too; raised on
        sock.close()
        raise
    return line, can
