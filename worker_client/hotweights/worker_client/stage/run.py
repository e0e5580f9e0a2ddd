"""Buckets that a thread fetches over one connection, one after the other, and hashes while they come.

    ask 1 --1 comes, hashed by parts--> ask 2 as soon as it does --> right? --2 comes ...

The event loop hears of them when the run is over: handing each to and fro cost more than hashing it, and what is hashed
right after it came is in the core's cache still. A delta is put into what its base has when all of it is there.
"""

import time
from dataclasses import dataclass
from typing import Protocol

from hotweights.transports.base import Connection, Reads
from hotweights.transports.threads import Stop
from hotweights.v1.worker_service_pb2 import Source
from hotweights.worker_client.image.digests import PieceHasher
from hotweights.worker_client.stage.base import Base
from hotweights.worker_client.stage.partial import Partial

RUN_S = 0.25  # until the next source is chosen anew,
RUN_BUCKETS = 4  # but not before so many took as long as the first


@dataclass
class Came:
    """A bucket that was received, and is not known to be right yet."""

    index: int
    source: Source
    connection: Connection
    way: str
    origin: str
    """See Connection.origin."""
    size: int
    """Of what came, in bytes."""
    base: Base | None
    """To which a delta was asked for."""
    delta: bytes | None
    """What came instead of the bucket."""


class Buckets(Protocol):
    """What a run asks of the fetch it belongs to. All of it is thread-safe."""

    def next_now(self) -> int | None:
        """A bucket that may be received at once, which is the run's from now on."""

    def base_for(self, index: int, source: Source) -> Base | None:
        """To what a delta of a bucket may be asked of a source."""

    def deadline_s(self, index: int) -> float:
        """For a bucket to come."""

    def take(self, came: Came) -> None:
        """Of a bucket that is right."""


def came_of(
    index: int, source: Source, connection: Connection, size: int, base: Base | None, place: memoryview
) -> Came:
    """Of `size` bytes that came at the beginning of `place`."""
    delta = bytes(place[:size]) if base is not None and size < len(place) else None
    return Came(index, source, connection, connection.way, connection.origin, size, base, delta)


class Run:
    """From bucket `index` on, until RUN_S is over, a bucket is wrong, or none may be received."""

    def __init__(self, buckets: Buckets, partial: Partial, connection: Connection, source: Source, index: int) -> None:
        self._buckets, self._partial = buckets, partial
        self._connection, self._source = connection, source
        self._index: int | None = index
        self._base: Base | None = None
        self._following: int | None = None
        self._following_base: Base | None = None
        self._has_asked = False
        self._ends = time.monotonic() + RUN_S
        self.wrong: list[Came] = []
        """What came and is not the bucket."""

    @property
    def not_come(self) -> list[int]:
        """What is to be asked for again, when it is over."""
        return [index for index in (self._following, self._index) if index is not None]

    def go_on(self, reads: Reads, stop: Stop) -> None:
        """In a thread. Raises TransportError, OSError."""
        begun, is_first = time.monotonic(), True
        self._base = self._ask(reads, self._index)
        while (index := self._index) is not None:
            self._has_asked = False
            came, hasher = self._receive(reads, stop, index)
            if is_first:
                self._ends = begun + max(RUN_S, RUN_BUCKETS * (time.monotonic() - begun))
            self._index, is_first = None, False
            try:
                self._ask_following(reads, stop)
            finally:
                if self._is_right(came, hasher):
                    self._buckets.take(came)
                else:
                    self.wrong.append(came)
            self._index, self._base = self._following, self._following_base
            self._following = None

    def _receive(self, reads: Reads, stop: Stop, index: int) -> tuple[Came, PieceHasher]:
        """The next is asked for as soon as it is known that this one comes."""
        hasher = self._partial.verifier.hasher(index)

        def arrived(part: memoryview) -> None:
            self._ask_following(reads, stop)
            hasher.update(part)

        with self._partial.view(index) as place:
            size = reads.take(place, deadline_s=self._buckets.deadline_s(index), came=arrived)
            return came_of(index, self._source, self._connection, size, self._base, place), hasher

    def _ask_following(self, reads: Reads, stop: Stop) -> None:
        """Once for each bucket."""
        if self._has_asked:
            return
        self._has_asked = True
        if not (stop() or self.wrong or time.monotonic() > self._ends):
            self._following = self._buckets.next_now()
            self._following_base = self._ask(reads, self._following)

    def _ask(self, reads: Reads, index: int | None) -> Base | None:
        """For a bucket, if there is one: the base to which its delta was asked for."""
        if index is None:
            return None
        bucket, base = self._partial.manifest.buckets[index], self._buckets.base_for(index, self._source)
        wish = self._partial.digest, bucket.file, bucket.offset, bucket.size_bytes
        reads.ask(*wish, None if base is None else base.digest)
        return base

    def _is_right(self, came: Came, hasher: PieceHasher) -> bool:
        if came.delta is None:
            return self._partial.verifier.confirms(came.index, hasher)
        return came.base is not None and came.base.rebuild(self._partial, came.index, came.delta)
