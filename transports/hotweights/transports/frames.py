"""The frames of the tcp transport: fixed binary, bounded, and nothing in them is ever executed.

    reader                               source
    HELLO magic, token           ---->
                                 <----   WELCOME what it can do; or REFUSED busy or TLS
    READ image, file, offset, size -->
                                 <----   DATA size, then that many bytes; or REFUSED why
    READ_AGAINST the same, base  ---->
                                 <----   as for READ; fewer bytes than asked for are a delta to the base

Where both have UCX, the frames stay on this connection and the bytes go beside it:

    JOIN image, seal, UCX address -->
                                 <----   JOINED seal, UCX address; or REFUSED why
    READ_TAGGED the same as READ_AGAINST, tag -->
                                 <----   DATA_TAGGED size, piece; and over UCX with that tag, piece by piece, the bytes

Where a file lies in a folder that other nodes see too, whoever may read it is told so:

    LOCATE image, file           ---->
                                 <----   LOCATED size, time of change, path; or nothing; or REFUSED why

Where both are ranks of one MPI job, a bucket goes to all of its ranks at once:

    READ_CAST job, image, file, offset, size -->
                                 <----   CAST in which broadcast it went, or goes; or as for READ

The seal is made with the token: UCX ends its process on an address that is none, so it sees only what its holders made.

REFUSED ends the connection, unless it is that a range is not held, or not yet.

Every frame is: length of the body (4 bytes, big endian), kind (1 byte), body. Only the bytes after
DATA are longer than FRAME_BYTES_MAX, and their number was asked for.
"""

import asyncio
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from hotweights.transports.base import IMAGE_BYTES, RANGE_BYTES_MAX, TOKEN_BYTES_MAX, Place
from hotweights.transports.line import Line, NoTls

MAGIC = b"HOTWTS01"
FRAME_BYTES_MAX = 8192
JOB_BYTES = 16
# What a reader keeps memory for.
PIECE_BYTES_MAX = 4 << 20
# About a millisecond of copying.
YIELD_BYTES = 4 << 20
PART_BYTES = 1 << 20
_TEXT_BYTES_MAX = 512
PATH_BYTES_MAX = 4096
# How a peer that speaks TLS begins: with an alert, or with its handshake.
_TLS = (b"\x15\x03", b"\x16\x03")

_PREFIX = struct.Struct("!IB")
_READ, _READ_AGAINST = struct.Struct("!32sIQQ"), struct.Struct("!32sIQQ32s")
_READ_TAGGED = struct.Struct("!32sIQQ32sQ")
_DATA, _DATA_TAGGED = struct.Struct("!Q"), struct.Struct("!QQ")
_READ_CAST, _CAST = struct.Struct(f"!{JOB_BYTES}s32sIQQ"), struct.Struct("!Q")
_LOCATE, _LOCATED = struct.Struct("!32sI"), struct.Struct("!QQ")
_NO_BASE = bytes(32)
_SEAL_BYTES = 32


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    READ = 3
    DATA = 4
    REFUSED = 5
    READ_AGAINST = 6
    JOIN = 7
    JOINED = 8
    READ_TAGGED = 9
    DATA_TAGGED = 10
    LOCATE = 11
    LOCATED = 12
    READ_CAST = 13
    CAST = 14


_KINDS = frozenset(Kind)


class Why(IntEnum):
    """Why a source refuses."""

    NOT_HELD = 1
    TOKEN = 2
    BUSY = 3
    # In plaintext, to who speaks none where this side does, or the reverse.
    TLS = 4
    # The text is how many bytes of the image there are.
    NOT_YET = 5


class Can(IntFlag):
    """What a source tells of itself in its WELCOME: one of an earlier version says nothing."""

    DELTAS = 1
    UCX = 2
    LOCATE = 4
    CAST = 8


class Garbage(Exception):
    """What came is no frame of ours, or not one that was due."""


class Ended(Exception):
    """The other side closed the connection. `midway` if in the middle of something."""

    def __init__(self, *, midway: bool) -> None:
        super().__init__("ended the connection" + (" in the middle of a transfer" if midway else ""))
        self.midway = midway


@dataclass(frozen=True)
class Read:
    """A reader's wish."""

    image: bytes
    file: int
    offset: int
    size: int
    base: bytes | None = None
    tag: int | None = None
    job: bytes | None = None


@dataclass(frozen=True)
class Join:
    """A reader's UCX address, sealed, and an image that he may read."""

    image: bytes
    sealed: bytes


@dataclass(frozen=True)
class Locate:
    """A reader that may see the source's files himself asks where one of them is."""

    image: bytes
    file: int


Wish = Read | Join | Locate


def frame(kind: Kind, body: bytes = b"") -> bytes:
    """A whole frame."""
    return _PREFIX.pack(len(body), kind) + body


def hello(token: bytes) -> bytes:
    return frame(Kind.HELLO, MAGIC + token)


def welcome(can: Can) -> bytes:
    return frame(Kind.WELCOME, bytes([can]))


def read(image: bytes, file: int, offset: int, size: int, base: bytes | None = None) -> bytes:
    if base is None:
        return frame(Kind.READ, _READ.pack(image, file, offset, size))
    return frame(Kind.READ_AGAINST, _READ_AGAINST.pack(image, file, offset, size, base))


def read_tagged(image: bytes, file: int, offset: int, size: int, base: bytes | None, tag: int) -> bytes:
    return frame(Kind.READ_TAGGED, _READ_TAGGED.pack(image, file, offset, size, base or _NO_BASE, tag))


def read_cast(job: bytes, image: bytes, file: int, offset: int, size: int) -> bytes:
    return frame(Kind.READ_CAST, _READ_CAST.pack(job, image, file, offset, size))


def cast(number: int) -> bytes:
    return frame(Kind.CAST, _CAST.pack(number))


def locate(image: bytes, file: int) -> bytes:
    return frame(Kind.LOCATE, _LOCATE.pack(image, file))


def located(place: Place | None) -> bytes:
    """A place that no frame can tell, of a time before 1970 for example, is nowhere."""
    path = b"" if place is None else os.fsencode(place.path)
    if place is None or len(path) > PATH_BYTES_MAX or not 0 <= place.mtime_ns < 1 << 64:
        return frame(Kind.LOCATED)
    return frame(Kind.LOCATED, _LOCATED.pack(place.size_bytes, place.mtime_ns) + path)


def join(image: bytes, address: bytes, token: bytes) -> bytes:
    return frame(Kind.JOIN, image + _seal(address, token) + address)


def joined(address: bytes, token: bytes) -> bytes:
    return frame(Kind.JOINED, _seal(address, token) + address)


def _seal(address: bytes, token: bytes) -> bytes:
    return hmac.digest(token, address, "sha256")


def data_tagged(size: int, piece: int) -> bytes:
    return frame(Kind.DATA_TAGGED, _DATA_TAGGED.pack(size, piece))


def data(size: int) -> bytes:
    return frame(Kind.DATA, _DATA.pack(size))


def refused(why: Why, text: str = "") -> bytes:
    return frame(Kind.REFUSED, bytes([why]) + text.encode()[:_TEXT_BYTES_MAX])


def parse_hello(kind: Kind, body: bytes) -> bytes:
    """The token. Raises Garbage."""
    if kind is not Kind.HELLO or not body.startswith(MAGIC):
        raise Garbage("does not begin as a reader of this version does")
    if len(body) > len(MAGIC) + TOKEN_BYTES_MAX:
        raise Garbage("shows a token that is too long")
    return body[len(MAGIC) :]


def parse_welcome(kind: Kind, body: bytes) -> Can:
    """Raises Garbage. What a later version can do more is passed over."""
    if kind is not Kind.WELCOME:
        raise Garbage("does not answer as a source does")
    return Can(body[0] & sum(Can)) if body else Can(0)


def parse_wish(kind: Kind, body: bytes) -> Wish:
    """What a reader asks for. Raises Garbage."""
    if kind is Kind.LOCATE and len(body) == _LOCATE.size:
        return Locate(*_LOCATE.unpack(body))
    if kind is Kind.JOIN and len(body) > IMAGE_BYTES:
        return Join(body[:IMAGE_BYTES], body[IMAGE_BYTES:])
    if kind is Kind.READ_CAST and len(body) == _READ_CAST.size:
        job, image, file, offset, size = _READ_CAST.unpack(body)
        return _checked(Read(image, file, offset, size, job=job))
    form = {Kind.READ: _READ, Kind.READ_AGAINST: _READ_AGAINST, Kind.READ_TAGGED: _READ_TAGGED}.get(kind)
    if form is None or len(body) != form.size:
        raise Garbage("sent something else than a read")
    image, file, offset, size, *more = form.unpack(body)
    base, tag = [*more, None, None][:2]
    return _checked(Read(image, file, offset, size, None if base == _NO_BASE else base, tag))


def _checked(wish: Read) -> Read:
    if not 0 < wish.size <= RANGE_BYTES_MAX:
        raise Garbage(f"asks for {wish.size} bytes at once")
    return wish


def parse_joined(kind: Kind, body: bytes, token: bytes) -> bytes:
    """The source's UCX address. Raises Garbage."""
    if kind is not Kind.JOINED:
        raise Garbage("answered with something else than its UCX address")
    return parse_sealed(body, token)


def parse_sealed(sealed: bytes, token: bytes) -> bytes:
    """A UCX address that was made by who has the token. Raises Garbage."""
    seal, address = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
    if not address or not hmac.compare_digest(seal, _seal(address, token)):
        raise Garbage("shows what is no UCX address of this version")
    return address


def parse_data_tagged(kind: Kind, body: bytes) -> tuple[int, int]:
    """How many bytes come over UCX, and how many in a piece. Raises Garbage."""
    if kind is not Kind.DATA_TAGGED or len(body) != _DATA_TAGGED.size:
        raise Garbage("answered a read over UCX with something else")
    size, piece = _DATA_TAGGED.unpack(body)
    if not 0 < piece <= PIECE_BYTES_MAX:
        raise Garbage(f"sends pieces of {piece} bytes")
    return int(size), int(piece)


def parse_data(kind: Kind, body: bytes) -> int:
    """How many bytes follow. Raises Garbage."""
    if kind is not Kind.DATA or len(body) != _DATA.size:
        raise Garbage("answered a read with something else")
    (size,) = _DATA.unpack(body)
    return int(size)


def parse_cast(kind: Kind, body: bytes) -> int:
    """In which broadcast a bucket went. Raises Garbage."""
    if kind is not Kind.CAST or len(body) != _CAST.size:
        raise Garbage("does not say in which broadcast a bucket went")
    (number,) = _CAST.unpack(body)
    return int(number)


def parse_located(kind: Kind, body: bytes) -> Place | None:
    """Where the file is; None for nowhere that the source knows of. Raises Garbage."""
    if kind is not Kind.LOCATED or 0 < len(body) <= _LOCATED.size or b"\0" in body[_LOCATED.size :]:
        raise Garbage("does not say where a file is")
    if not body:
        return None
    size, mtime_ns = _LOCATED.unpack_from(body)
    return Place(os.fsdecode(body[_LOCATED.size :]), size, mtime_ns)


def parse_refused(body: bytes) -> tuple[Why, str]:
    """Raises Garbage."""
    try:
        return Why(body[0]), body[1:].decode(errors="replace")
    except (IndexError, ValueError):
        raise Garbage("refused without a reason") from None


def parse_held(text: str) -> int:
    """How many bytes of the image a source has that refuses with NOT_YET. Raises Garbage."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(1 << 64)):
        raise Garbage("does not say how much it has")
    return int(text)


async def receive_frame(line: Line) -> tuple[Kind, bytes]:
    """The next frame. Raises Garbage, Ended, OSError, NoTls. Has no deadline of its own."""
    prefix = bytearray(_PREFIX.size)
    await receive_into(line, memoryview(prefix), midway=False)
    if prefix.startswith(_TLS):
        raise NoTls("speaks TLS, and this side does not", one_is_plain=True)
    length, number = _PREFIX.unpack(prefix)
    if length > FRAME_BYTES_MAX or number not in _KINDS:
        raise Garbage("sent what is no frame")
    body = bytearray(length)
    await receive_into(line, memoryview(body), midway=True)
    return Kind(number), bytes(body)


async def receive_into(
    line: Line, into: memoryview, *, midway: bool, came: Callable[[memoryview], object] | None = None
) -> None:
    """Fills `into`. `came` is given each part as soon as it is there, PART_BYTES at most: it is in the cache then.

    Raises Ended, OSError, NoTls. Has no deadline of its own.
    """
    at = unyielded = 0
    most = len(into) if came is None else PART_BYTES
    while at < len(into):
        got = await line.receive_some(into[at : at + most])
        if not got:
            raise Ended(midway=midway or at > 0)
        if came is not None:
            came(into[at : at + got])
        at += got
        unyielded += got
        if unyielded >= YIELD_BYTES:
            # What is ready is received without waiting; a fast peer would keep the loop to itself.
            unyielded = 0
            await asyncio.sleep(0)
