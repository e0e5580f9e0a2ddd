"""Files that source and reader both see (NFS, Lustre, a mounted bucket) are read in place, by ranges.

    reader                                       source
    LOCATE image, file   --its own transport-->  a path below a folder that its node shares, size, time of change
    a path below a folder that this node shares too
      --opened, of that size and time--> read by pieces

The rest, and what cannot be read so, comes over the source's own transport. So do deltas: they are less to read. Which
folders a node shares its user says: nothing beyond them is read, whatever a source names. What is read is verified by
who reads, as always; what is wrong there, or does not come in time, is this node's to know, and no fault of the source.
"""

import asyncio
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from hotweights.transports.base import BucketSource, Place, TokenCheck, check_range
from hotweights.transports.errors import DeadlinePassed, PeerGone, TlsFailed, TokenRefused
from hotweights.transports.tcp import TcpConnection, TcpTransport
from hotweights.transports.tcp_server import TcpServer

T = TypeVar("T")

PIECE_BYTES = 4 << 20
# After a read of a shared folder that did not end in time, nothing is read in place for so long.
HANGS_S = 600.0
# Reads of shared folders, at once and of all connections: of a file system that hangs none ends.
READS_MAX = 16
# Files that were found to be another than the source says.
DOUBTED_MAX = 4096
_FILE = "file"


class SharedFolders:
    """Those that this node shares, and what is known against reading there."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._hangs_until = 0.0
        self._doubted: OrderedDict[tuple[bytes, int], str] = OrderedDict()
        self._reads = threading.BoundedSemaphore(READS_MAX)

    def against(self, image: bytes, file: int) -> str:
        """Why a file is not to be read in place; empty where it may be."""
        if time.monotonic() < self._hangs_until:
            return "a read there did not end in time"
        return self._doubted.get((image, file), "")

    def doubt(self, image: bytes, file: int, why: str) -> None:
        self._doubted[image, file] = why
        if len(self._doubted) > DOUBTED_MAX:
            self._doubted.popitem(last=False)

    def hang(self) -> None:
        self._hangs_until = time.monotonic() + HANGS_S

    def has(self, path: str) -> bool:
        """Blocks."""
        return is_below(path, self._roots)

    def read(self, place: Place, offset: int, into: memoryview) -> None:
        """As read_range, of nothing beyond these folders."""
        read_range(place, self._roots, offset, into)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What may block for ever, in a thread that the process does not wait for. Raises OSError where many do so."""
        if not self._reads.acquire(blocking=False):
            raise OSError("too many reads of shared folders have not ended")
        outcome = Future[T]()
        outcome.set_running_or_notify_cancel()  # who waits may be called off, it may not

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:  # noqa: BLE001 - carried to who waits, where it is raised
                outcome.set_exception(error)
            finally:
                self._reads.release()

        threading.Thread(target=run, name="shared folder", daemon=True).start()
        return await asyncio.wrap_future(outcome)


class SharedConnection:
    """See base.Connection. Made by SharedTransport.connect."""

    def __init__(self, connection: TcpConnection, address: str, folders: SharedFolders) -> None:
        self.way, self.origin = connection.way, connection.origin
        self._connection = connection
        self._address = address
        self._folders = folders
        self._places: dict[tuple[bytes, int], Place | None] = {}
        self._turn = asyncio.Lock()
        self._closed = asyncio.Event()
        self._cut = False
        """A read of a file was called off: by who asked for it, or by its deadline."""

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        check_range(image, offset, into.nbytes, base)
        ends = asyncio.get_running_loop().time() + deadline_s
        try:
            if base is None and not self._folders.against(image, file):
                in_place = self._read_in_place(image, file, offset, into.cast("B"), deadline_s)
                if await asyncio.wait_for(in_place, deadline_s):
                    return into.nbytes
            left_s = max(0.0, ends - asyncio.get_running_loop().time())
            size = await self._connection.read_into(image, file, offset, into, deadline_s=left_s, base=base)
        except (asyncio.TimeoutError, DeadlinePassed):
            if self._cut:
                self._folders.hang()
            raise DeadlinePassed(self._address, "reading", deadline_s) from None
        why = self._folders.against(image, file)
        self.way = f"{self._connection.way} (not from the shared folder: {why})" if why else self._connection.way
        self.origin = self._connection.origin
        return size

    async def _read_in_place(self, image: bytes, file: int, offset: int, into: memoryview, deadline_s: float) -> bool:
        """False where the file is not to be read so. Raises TransportError."""
        async with self._turn:
            if self._closed.is_set():
                raise PeerGone(self._address, "the connection is closed")
            try:
                place = await self._find(image, file, deadline_s)
            except OSError as error:
                self._folders.doubt(image, file, error.strerror or str(error))
                return False
            if place is None:
                return False
            try:
                await self._fill(place, offset, into)
            except OSError as error:
                self._folders.doubt(image, file, error.strerror or str(error))
                return False
            except asyncio.CancelledError:  # a deadline too
                self._closed.set()
                await self._connection.close()
                raise
            self.way = self.origin = _FILE
            return True

    async def _find(self, image: bytes, file: int, deadline_s: float) -> Place | None:
        """Where the file is, if that is below what is shared. Raises TransportError, OSError."""
        if (image, file) not in self._places:
            try:
                place = await self._connection.locate(image, file, deadline_s=deadline_s)
            except (TokenRefused, PeerGone, TlsFailed):
                self._closed.set()
                raise
            if place is not None:
                path = place.path
                place = place if await self._folders.in_thread(lambda: self._folders.has(path)) else None
            self._places[image, file] = place
        return self._places[image, file]

    async def _fill(self, place: Place, offset: int, into: memoryview) -> None:
        """Over memory of our own: a thread that a file system hangs cannot be called off. Raises OSError."""
        if offset + len(into) > place.size_bytes:
            raise OSError("the file ends before the range")
        memory = memoryview(bytearray(min(PIECE_BYTES, len(into))))
        for at in range(0, len(into), PIECE_BYTES):
            part = memory[: min(PIECE_BYTES, len(into) - at)]
            read = partial(self._folders.read, place, offset + at, part)
            reading = asyncio.ensure_future(self._folders.in_thread(read))
            closing = asyncio.ensure_future(self._closed.wait())
            try:
                await asyncio.wait((reading, closing), return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self._cut = True
                raise
            finally:
                closing.cancel()
                reading.cancel()
            if self._closed.is_set():
                raise PeerGone(self._address, "the connection is closed")
            reading.result()
            into[at : at + len(part)] = part

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        if origin != _FILE:
            return self._connection.doubt(image, file, origin)
        self._folders.doubt(image, file, "its bytes are another version's")
        return True

    async def close(self) -> None:
        self._closed.set()
        await self._connection.close()


class SharedTransport:
    """See base.Transport: another, whose connections read in place what lies below the folders `roots`."""

    def __init__(self, transport: TcpTransport, roots: Sequence[Path]) -> None:
        self.name = transport.name
        self._transport = transport
        self._folders = SharedFolders(roots)

    async def serve(
        self, source: BucketSource, listen: str, *, check: TokenCheck, advertise: str | None = None
    ) -> TcpServer:
        return await self._transport.serve(source, listen, check=check, advertise=advertise)

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> SharedConnection:
        connection = await self._transport.connect(address, token=token, deadline_s=deadline_s)
        return SharedConnection(connection, address, self._folders)


def is_below(path: str, roots: Sequence[Path]) -> bool:
    """Whether a path, links followed, leads to something below one of the folders. Blocks."""
    real = os.path.realpath(path)
    return os.path.isabs(path) and any(real.startswith(f"{os.path.realpath(root)}{os.sep}") for root in roots)


def read_range(place: Place, roots: Sequence[Path], offset: int, into: memoryview) -> None:
    """Fills `into` from there on. Raises OSError, for a file that is not the one that was meant too. Blocks."""
    handle = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        _check_same(handle, place, roots)
        at = 0
        while at < len(into):
            got = os.preadv(handle, [into[at:]], offset + at)
            if not got:
                raise OSError("the file ends before the range")
            at += got
        _check_same(handle, place, roots)
    finally:
        os.close(handle)


def _check_same(handle: int, place: Place, roots: Sequence[Path]) -> None:
    """Of the open file: its path may lead elsewhere by now."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (place.size_bytes, place.mtime_ns):
        raise OSError("the file there is another")
    opened = f"/proc/self/fd/{handle}"
    if not is_below(opened if os.path.exists(opened) else place.path, roots):
        raise OSError("the file there is beyond what is shared")
