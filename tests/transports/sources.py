"""A source that holds one image, and a server of it over any transport."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hotweights.transports.base import FileRange, Place, Range, Server, Transport
from hotweights.transports.errors import NotHeld, NotYet

IMAGE = bytes(range(32))
TOKEN = b"a good token"
MIB = 1 << 20


def pattern(size: int) -> bytes:
    """Bytes of which no two ranges of any length look the same, and the first is not zero."""
    numbers = np.arange(-(-size // 8), dtype="<u8")
    return bytes((numbers << 8 | (numbers % 250 + 1)).astype("<u8").tobytes()[:size])


@dataclass
class Held:
    """A BucketSource of one file. With `gate`, opening waits until a test opens it.

    Where `there` is given, so many bytes from the start have come so far: `come` brings more. What is `in_memory` is
    given without a thread. `deltas`, by base, are of every range; those of
    `made_before` are at hand. Where `path` is given, ranges are of that file. `place` is where its readers find the
    file.
    """

    content: bytes
    gate: threading.Event | None = None
    opened: threading.Event = field(default_factory=threading.Event)
    there: int | None = None
    in_memory: bool = False
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    made_before: dict[bytes, bytes] = field(default_factory=dict)
    place: Place | None = None
    path: Path | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> Range | None:
        return self.open(image, file, offset, size) if self.in_memory else None

    def open(self, image: bytes, file: int, offset: int, size: int) -> Range:
        self.opened.set()
        if self.gate is not None:
            assert self.gate.wait(timeout=30)
        if image != IMAGE or file != 0 or offset + size > len(self.content):
            raise NotHeld(image, file, offset, size, "only one file of one image here")
        if self.there is not None and offset + size > self.there:
            raise NotYet(image, self.there)
        if self.path is not None:
            return FileRange(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), offset, size)
        return memoryview(self.content)[offset : offset + size]

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> bytes | None:
        return self.made_before.get(base)

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        return self.deltas.get(base)

    def locate(self, image: bytes, file: int) -> Place | None:
        return self.place

    async def until_more(self, image: bytes) -> None:
        await self.news.wait()

    def come(self, there: int) -> None:
        self.there = there
        self.news.set()
        self.news = asyncio.Event()


def accept_good_token(token: bytes, image: bytes) -> bool:
    return token == TOKEN and image == IMAGE


@asynccontextmanager
async def serving(transport: Transport, source: Held) -> AsyncIterator[Server]:
    server = await transport.serve(source, "127.0.0.1:0", check=accept_good_token)
    try:
        yield server
    finally:
        if source.gate is not None:
            source.gate.set()
        await server.close()
