"""An in-process network with the promises of a real one, for tests of what uses a transport.

Bytes are copied a chunk at a time with the event loop let in between, so that peers can die, readers
be cancelled and deadlines pass in the middle of a bucket, as they do on a wire.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

from hotweights.transports.base import BucketSource, TokenCheck, check_range, check_token, in_memory, open_shortest
from hotweights.transports.errors import DeadlinePassed, PeerGone, TokenRefused

CHUNK_BYTES = 256 << 10


@dataclass
class MemoryNetwork:
    """Who serves under which address. Servers with the same network reach each other."""

    servers: dict[str, "MemoryServer"] = field(default_factory=dict)
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))


_PROCESS = MemoryNetwork()


class MemoryServer:
    """Part of MemoryTransport; see base.Server."""

    def __init__(self, network: MemoryNetwork, address: str, source: BucketSource, check: TokenCheck) -> None:
        self.address = address
        self.source = source
        self.check = check
        self.closed = asyncio.Event()
        self._network = network

    async def close(self) -> None:
        self.closed.set()
        if self._network.servers.get(self.address) is self:
            del self._network.servers[self.address]


class MemoryConnection:
    """Part of MemoryTransport; see base.Connection."""

    way = "memory"
    origin = ""

    def __init__(self, server: MemoryServer, token: bytes) -> None:
        self._server = server
        self._token = token
        self._closed = asyncio.Event()
        self._turn = asyncio.Lock()

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        check_range(image, offset, into.nbytes, base)
        try:
            return await asyncio.wait_for(self._read(image, file, offset, into.cast("B"), base), deadline_s)
        except asyncio.TimeoutError:
            raise DeadlinePassed(self._server.address, "reading", deadline_s) from None

    async def _read(self, image: bytes, file: int, offset: int, into: memoryview, base: bytes | None) -> int:
        async with self._turn:
            self._check_alive()
            if not self._server.check(self._token, image):
                self._closed.set()
                raise TokenRefused(self._server.address, image)
            try:
                with await self._open(image, file, offset, len(into), base) as view:
                    size = len(view)
                    for at in range(0, size, CHUNK_BYTES):
                        self._check_alive()
                        end = min(at + CHUNK_BYTES, size)
                        into[at:end] = view[at:end]
                        await asyncio.sleep(0)
                    return size
            except asyncio.CancelledError:  # a deadline too
                self._closed.set()
                raise

    async def _open(self, image: bytes, file: int, offset: int, size: int, base: bytes | None) -> memoryview:
        """Opens in a thread; the end of either side does not wait for it."""
        opening = asyncio.ensure_future(open_shortest(self._server.source, image, file, offset, size, base))
        ends = [asyncio.ensure_future(event.wait()) for event in (self._closed, self._server.closed)]
        try:
            await asyncio.wait([opening, *ends], return_when=asyncio.FIRST_COMPLETED)
            self._check_alive()
            return in_memory(await opening)
        finally:
            for future in (opening, *ends):
                future.cancel()
            await asyncio.gather(opening, *ends, return_exceptions=True)  # at once: none of them waits for the thread

    def _check_alive(self) -> None:
        if self._closed.is_set():
            raise PeerGone(self._server.address, "the connection is closed")
        if self._server.closed.is_set():
            self._closed.set()
            raise PeerGone(self._server.address, "ended the connection")

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        return False

    async def close(self) -> None:
        self._closed.set()


class MemoryTransport:
    """See base.Transport. `listen` is any text; an empty one, or one that ends in ":0", gets a number."""

    name = "memory"

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self._network = network or _PROCESS

    async def serve(
        self, source: BucketSource, listen: str, *, check: TokenCheck, advertise: str | None = None
    ) -> MemoryServer:
        address = advertise or listen
        if not address or address.endswith(":0"):
            address = f"memory:{next(self._network.numbers)}"
        if address in self._network.servers:
            raise OSError(f"{address} is taken")
        server = self._network.servers[address] = MemoryServer(self._network, address, source, check)
        return server

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> MemoryConnection:
        check_token(token)
        server = self._network.servers.get(address)
        if server is None:
            raise PeerGone(address, "nobody listens there")
        return MemoryConnection(server, token)
