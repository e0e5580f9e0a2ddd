"""Deltas of buckets that were made or received lately, or made ahead: readers of one source ask for the same ones."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from hotweights.v1.manifest_pb2 import Bucket, Manifest

# Image, base, file, offset, size.
Key: TypeAlias = tuple[bytes, bytes, int, int, int]

KEPT_BYTES = 64 << 20
USELESS_MAX, TRIED_OF = 8, 8  # buckets of a version of which no delta is smaller
PAIRS_MAX = 64
ROOM_KEPT_BYTES = 16 << 20  # buckets are larger only where somebody set it so


def changed_buckets(target: Manifest, base: Manifest) -> list[Bucket]:
    """Buckets that `base` has at the same place, with other bytes."""
    before = {(bucket.file, bucket.offset, bucket.size_bytes): bucket.digest for bucket in base.buckets}
    places = ((bucket, (bucket.file, bucket.offset, bucket.size_bytes)) for bucket in target.buckets)
    return [bucket for bucket, place in places if before.get(place, bucket.digest) != bucket.digest]


class Worth:
    """Between which images deltas are worth making: where the last USELESS_MAX were none, one in TRIED_OF is tried."""

    def __init__(self) -> None:
        self._useless: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._lock = threading.Lock()

    def is_tried(self, image: bytes, base: bytes) -> bool:
        """Whether to make the next one. Thread-safe."""
        with self._lock:
            useless = self._useless.get((image, base), 0)
            if useless < USELESS_MAX:
                return True
            self._useless[image, base] = useless + 1
            return (useless - USELESS_MAX) % TRIED_OF == TRIED_OF - 1

    def tell(self, image: bytes, base: bytes, *, useful: bool) -> None:
        """Of one that was tried. Thread-safe."""
        with self._lock:
            if useful:
                self._useless.pop((image, base), None)
                return
            self._useless[image, base] = self._useless.pop((image, base), 0) + 1
            if len(self._useless) > PAIRS_MAX:
                self._useless.popitem(last=False)


class Rooms:
    """Memory for `count` buckets, used again and again: new pages take longer than what is read into them.

    What is larger than ROOM_KEPT_BYTES is not kept.
    """

    def __init__(self, count: int) -> None:
        self._turns = threading.BoundedSemaphore(count)
        self._free: list[bytearray] = []

    @contextmanager
    def take(self, size_bytes: int) -> Iterator[memoryview]:
        """One of them, for as long. Waits until there is one. Thread-safe."""
        with self._turns:
            try:
                room = self._free.pop()
            except IndexError:
                room = bytearray()
            if len(room) < size_bytes:
                room = bytearray(size_bytes)
            try:
                yield memoryview(room)[:size_bytes]
            finally:
                if len(room) <= ROOM_KEPT_BYTES:
                    self._free.append(room)


class Deltas:
    """The last KEPT_BYTES of them. Thread-safe."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._bytes = 0
        self._deltas: OrderedDict[Key, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> bytes | None:
        with self._lock:
            if (delta := self._deltas.get(key)) is not None:
                self._deltas.move_to_end(key)
            return delta

    def put(self, key: Key, delta: bytes) -> None:
        with self._lock:
            self._bytes += len(delta) - len(self._deltas.pop(key, b""))
            self._deltas[key] = delta
            while self._bytes > self._kept_bytes:
                _, oldest = self._deltas.popitem(last=False)
                self._bytes -= len(oldest)
