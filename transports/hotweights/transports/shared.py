"""Files that source and reader both see (NFS, Lustre, a mounted bucket) are read in place, by ranges.

    reader                                       source
    LOCATE image, file   --its own transport-->  a path below a folder that its node shares, size, time of change
    a path below a folder that this node shares too
      --opened, of that size and time--> read by pieces

The rest, and what cannot be read so, comes over the source's own transport. So do deltas: they are less to read. Which
folders a node shares its user says: nothing beyond them is opened, whatever a source names. What is read is verified
by who reads, as always.
"""

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hotweights.transports.base import BucketSource, Place, TokenCheck, check_range
from hotweights.transports.errors import DeadlinePassed, PeerGone
from hotweights.transports.tcp import TcpConnection, TcpTransport
from hotweights.transports.tcp_server import TcpServer

PIECE_BYTES = 4 << 20


class SharedConnection:
    """See base.Connection. Made by SharedTransport.connect."""

    def __init__(self, connection: TcpConnection, address: str, roots: Sequence[Path]) -> None:
        self.way = connection.way
        self._connection = connection
        self._address = address
        self._roots = roots
        self._reason = ""
        self._places: dict[tuple[bytes, int], Place | None] = {}
        self._turn = asyncio.Lock()
        self._closed = asyncio.Event()

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        check_range(image, offset, into.nbytes, base)
        ends = asyncio.get_running_loop().time() + deadline_s
        try:
            if base is None:
                in_place = self._read_in_place(image, file, offset, into.cast("B"), deadline_s)
                if await asyncio.wait_for(in_place, deadline_s):
                    return into.nbytes
            self.way = self._reason or self._connection.way
            left_s = max(0.0, ends - asyncio.get_running_loop().time())
            return await self._connection.read_into(image, file, offset, into, deadline_s=left_s, base=base)
        except (asyncio.TimeoutError, DeadlinePassed):
            raise DeadlinePassed(self._address, "reading", deadline_s) from None

    async def _read_in_place(self, image: bytes, file: int, offset: int, into: memoryview, deadline_s: float) -> bool:
        """False where the file is not to be read so. Raises TransportError."""
        async with self._turn:
            if self._closed.is_set():
                raise PeerGone(self._address, "the connection is closed")
            try:
                place = await self._find(image, file, deadline_s)
                if place is None:
                    return False
                await self._fill(place, offset, into)
            except OSError as error:
                self._places[image, file] = None
                self._reason = f"{self._connection.way} (not from the shared folder: {error.strerror or error})"
                return False
            except BaseException:
                await self.close()
                raise
            self.way = "file"
            return True

    async def _find(self, image: bytes, file: int, deadline_s: float) -> Place | None:
        """Where the file is, if that is below what is shared. Raises TransportError, OSError."""
        if (image, file) not in self._places:
            place = await self._connection.locate(image, file, deadline_s=deadline_s)
            if place is not None and not await asyncio.to_thread(is_below, place.path, self._roots):
                place = None
            self._places[image, file] = place
        return self._places[image, file]

    async def _fill(self, place: Place, offset: int, into: memoryview) -> None:
        """Over memory of our own: a thread that a file system hangs cannot be called off. Raises OSError."""
        memory = memoryview(bytearray(min(PIECE_BYTES, len(into))))
        for at in range(0, len(into), PIECE_BYTES):
            part = memory[: min(PIECE_BYTES, len(into) - at)]
            reading = asyncio.ensure_future(asyncio.to_thread(read_range, place, offset + at, part))
            reading.add_done_callback(_look_at)
            closing = asyncio.ensure_future(self._closed.wait())
            try:
                await asyncio.wait((reading, closing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                closing.cancel()
            if self._closed.is_set():
                raise PeerGone(self._address, "the connection is closed")
            reading.result()
            into[at : at + len(part)] = part

    async def close(self) -> None:
        self._closed.set()
        await self._connection.close()


class SharedTransport:
    """See base.Transport: another, whose connections read in place what lies below the folders `roots`."""

    def __init__(self, transport: TcpTransport, roots: Sequence[Path]) -> None:
        self.name = transport.name
        self._transport = transport
        self._roots = roots

    async def serve(
        self, source: BucketSource, listen: str, *, check: TokenCheck, advertise: str | None = None
    ) -> TcpServer:
        return await self._transport.serve(source, listen, check=check, advertise=advertise)

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> SharedConnection:
        connection = await self._transport.connect(address, token=token, deadline_s=deadline_s)
        return SharedConnection(connection, address, self._roots)


def is_below(path: str, roots: Sequence[Path]) -> bool:
    """Whether a path, links followed, leads to something below one of the folders."""
    real = os.path.realpath(path)
    return os.path.isabs(path) and any(real.startswith(f"{os.path.realpath(root)}{os.sep}") for root in roots)


def read_range(place: Place, offset: int, into: memoryview) -> None:
    """Fills `into` from there on. Raises OSError, for a file that is not the one that was meant too. Blocks."""
    handle = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        _check_same(handle, place)
        at = 0
        while at < len(into):
            got = os.preadv(handle, [into[at:]], offset + at)
            if not got:
                raise OSError("the file ends before the range")
            at += got
        _check_same(handle, place)
    finally:
        os.close(handle)


def _check_same(handle: int, place: Place) -> None:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (place.size_bytes, place.mtime_ns):
        raise OSError("the file there is another")


def _look_at(reading: "asyncio.Future[None]") -> None:
    """At what became of a thread that nobody waits for any longer."""
    if not reading.cancelled():
        reading.exception()
