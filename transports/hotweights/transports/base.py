"""The interface of a transport, and the same promises from every one of them.

    reader                                         source
    Transport.connect(address, token)              Transport.serve(source, listen, check)
        Connection.read_into(range, memory) -----> check(token, image), source.open(range)
        or in_thread, where it has that: ask, take
                                            <----- its bytes, straight into the reader's memory
          the same with a base              -----> and source.delta(range, base)
                                            <----- what changed, where that is less

What is promised, and proven by tests/transports/test_conformance.py:

- `read_into` returns when all bytes are in place, and raises otherwise. After an error, a deadline
  or a cancellation, nothing writes to that memory any more; how much of it was written is unknown.
- A read that is refused with NotHeld or NotYet leaves the connection usable, and so does one that
  ends while it waits for its turn. Any other error, a deadline and a cancellation in the middle of a read
  close it: it is between two frames no longer. TokenRefused does so too: a source keeps no place
  for who may not read.
- Nothing is verified here. Who reads compares digests.
"""

import asyncio
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias, runtime_checkable

from hotweights.transports.errors import NotHeld, NotYet
from hotweights.transports.threads import Stop

# The largest range one read may ask for: sources may have to hold it in memory.
RANGE_BYTES_MAX = 1 << 30
IMAGE_BYTES = 32
TOKEN_BYTES_MAX = 512
# A source lets a reader wait so long for what is on its way: silence for longer is no answer.
WAIT_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where a file of an image lies in a folder that other nodes see too, and how they know that it is the same."""

    path: str
    size_bytes: int
    mtime_ns: int


class FileRange:
    """A range of a file in memory (tmpfs): sent by the system from where it lies, or mapped for who needs the bytes.

    Nobody may write to the file any more. The handle is closed with `release`.
    """

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self.handle, self.offset, self.nbytes = handle, offset, size

    def mapped(self) -> memoryview:
        """Its bytes, which stay when this is released and the file is removed.

        Raises OSError, for a file that has become shorter too.
        """
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        skip = self.offset - begin
        try:
            whole = mmap.mmap(self.handle, skip + self.nbytes, prot=mmap.PROT_READ, offset=begin)
        except ValueError as error:
            raise OSError(f"the file ends before the range: {error}") from error
        return memoryview(whole)[skip:]

    def release(self) -> None:
        """As of a memoryview: again does nothing."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> "FileRange":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


Range: TypeAlias = memoryview | FileRange


def in_memory(found: Range) -> memoryview:
    """The bytes of a range; of a file's, mapped. Raises OSError."""
    if isinstance(found, memoryview):
        return found
    with found:
        return found.mapped()


class BucketSource(Protocol):
    """What a server serves from."""

    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> Range | None:
        """As `open`, for what is in memory: called on the event loop, must not block. None where it may: open it."""

    def open(self, image: bytes, file: int, offset: int, size: int) -> Range:
        """The bytes of a range of an image's file, to be read until the server releases the view.

        Called in a thread: it may block on a disk. `image` is a digest, `file` an index, both as
        the reader gave them; the range is not checked. Raises NotHeld; an OSError counts as that.
        NotYet for what is on its way here.
        """

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> bytes | None:
        """As `delta`, of one that is there already: called on the event loop, must not block."""

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        """What makes `view`, a range of `image` that was just opened, of the same range of the image `base`.

        In an encoding between source and reader, and shorter than the range; None where there is no such thing.
        Called in a thread, as `open`.
        """

    def locate(self, image: bytes, file: int) -> Place | None:
        """Where a file of an image is to be found by others themselves; None where that is nowhere.

        Called in a thread, as `open`.
        """

    async def until_more(self, image: bytes) -> None:
        """Returns when more of an image has come than there was, or when it will come no more.

        Called on the event loop after `open` raised NotYet; the server waits WAIT_S at most, then tells the reader.
        """


class TokenCheck(Protocol):
    """Whether a token allows reading from an image now. Asked for every read: tokens expire."""

    def __call__(self, token: bytes, image: bytes) -> bool:
        """Called on the event loop: must be quick and must not raise."""


class Server(Protocol):
    """Serves from `serve` to `close`."""

    @property
    def address(self) -> str:
        """What readers pass to `connect`."""

    async def close(self) -> None:
        """Ends every connection, whatever it is at. Idempotent."""


class Connection(Protocol):
    """A way to one source. Reads on it happen one after the other; open several for more at once."""

    @property
    def way(self) -> str:
        """How the bytes come, for a person: the transport, and why it is that one where it could be another."""

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        """Fills `into` (writable, contiguous bytes) with the range that starts at `offset`; how many bytes came.

        To who names the digest of a `base` he has, the source may give its delta instead: then fewer bytes come than
        the range has, and they are at the beginning of `into`.
        `deadline_s` counts from the call, waiting for other reads of this connection included.
        Raises NotHeld, NotYet, TokenRefused, PeerGone, DeadlinePassed.
        """

    @property
    def origin(self) -> str:
        """Where what was read last came from, if not from the source itself; else empty."""

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        """What a read of the file gave was wrong, and came from `origin`: whether that is not the source.

        Then it is no failure of the source's, which itself is asked from now on.
        """

    async def close(self) -> None:
        """Idempotent. A read under way ends with PeerGone."""


class Reads(Protocol):
    """What a thread reads over one connection: `ask`, then `take`, and one more may be asked for meanwhile."""

    def ask(self, image: bytes, file: int, offset: int, size: int, base: bytes | None = None) -> None:
        """Sends a wish, as of Connection.read_into, and does not wait for the answer. Raises PeerGone,
        DeadlinePassed.

        After the one before was taken, or in its `came`.
        """

    def take(self, into: memoryview, *, deadline_s: float, came: Callable[[memoryview], object] | None = None) -> int:
        """Fills `into` with what was asked for: see Connection.read_into.

        `came` is given each part of a range as soon as it is there; of a delta none.
        """


@runtime_checkable
class ThreadConnection(Connection, Protocol):
    """A connection that may be read from in a thread too: many buckets in a row, and the event loop hears of none."""

    async def in_thread(self, work: Callable[[Reads, Stop], object]) -> bool:
        """Runs `work(reads, stop)` in a thread, in this connection's turn; False at once where there is none for it.

        Called off, it ends the read under way, makes `stop()` true and waits until the thread has let go. Raises what
        `work` raises. A read that failed closes the connection as read_into does, and so does what was asked for
        and not taken.
        """


class Transport(Protocol):
    """One way to move bytes between nodes."""

    @property
    def name(self) -> str:
        """As the registry has it."""

    async def serve(
        self, source: BucketSource, listen: str, *, check: TokenCheck, advertise: str | None = None
    ) -> Server:
        """Serves `source` at `listen`; readers are told `advertise` instead, where that is given.

        Raises OSError when it cannot listen there, ValueError for an address that is none.
        """

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> Connection:
        """A connection whose reads show `token`. Raises PeerGone, DeadlinePassed."""


def check_range(image: bytes, offset: int, size: int, base: bytes | None = None) -> None:
    """Raises ValueError for a read that no source could serve: a mistake of the caller."""
    for digest in (image,) if base is None else (image, base):
        if len(digest) != IMAGE_BYTES:
            raise ValueError(f"an image's digest has {IMAGE_BYTES} bytes, this one {len(digest)}")
    if offset < 0 or not 0 < size <= RANGE_BYTES_MAX:
        raise ValueError(f"{size} bytes from {offset} on; 1 to {RANGE_BYTES_MAX} at once are possible")


def check_token(token: bytes) -> None:
    """Raises ValueError for a token that no transport carries."""
    if len(token) > TOKEN_BYTES_MAX:
        raise ValueError(f"a token of {len(token)} bytes; at most {TOKEN_BYTES_MAX} are possible")


async def open_shortest(
    source: BucketSource, image: bytes, file: int, offset: int, size: int, base: bytes | None
) -> Range:
    """As open_or_wait; the delta to `base` instead where there is one."""
    delta = None if base is None else source.delta_at_hand(image, base, file, offset, size)
    if delta and len(delta) < size:
        return memoryview(delta)
    found = await open_or_wait(source, image, file, offset, size)
    if base is None:
        return found
    view = in_memory(found)
    # Called off, the thread goes on with the view, which goes with it.
    delta = await asyncio.to_thread(source.delta, image, base, file, offset, view)
    if not delta or len(delta) >= size:
        return view
    view.release()
    return memoryview(delta)


async def open_or_wait(source: BucketSource, image: bytes, file: int, offset: int, size: int) -> Range:
    """The range, once it is there. Raises NotHeld, and NotYet when that takes longer than WAIT_S."""
    try:
        return await _open(source, image, file, offset, size)
    except NotYet:
        ends = asyncio.get_running_loop().time() + WAIT_S
    while True:
        more = asyncio.ensure_future(source.until_more(image))  # from before the look: nothing is missed
        try:
            await asyncio.sleep(0)
            return await _open(source, image, file, offset, size)
        except NotYet:
            left_s = ends - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise
            await asyncio.wait([more], timeout=left_s)
        finally:
            more.cancel()


async def _open(source: BucketSource, image: bytes, file: int, offset: int, size: int) -> Range:
    """The range, and all of it: in a thread, unless it is at hand. Raises NotHeld, NotYet."""
    try:
        found = source.at_hand(image, file, offset, size)
        if found is None:
            found = await asyncio.to_thread(source.open, image, file, offset, size)
    except OSError as error:
        raise NotHeld(image, file, offset, size, f"cannot be read: {error}") from error
    given = found.nbytes
    if given != size:
        found.release()
        raise NotHeld(image, file, offset, size, f"the source gave {given} of them")
    return found.cast("B") if isinstance(found, memoryview) else found
