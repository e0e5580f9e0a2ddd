"""The version that an image on its way here follows, from which what did not change is taken without the wire.

    base's file --read--> memory of the thread --its delta put in--> hashed --right: written--> the image's file

Nothing of the base is trusted: each bucket is hashed, as any other. By reads and writes, not by maps: a page that is
touched in a map for the first time costs more than copying it.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.delta import BadDelta, apply_delta
from hotweights.worker_client.image.digests import on_all_cores, usable_cores
from hotweights.worker_client.stage.partial import Partial, Progress

THREADS_MAX = 8  # each has memory for a bucket

# File, offset, size.
Place: TypeAlias = tuple[int, int, int]


class Base:
    """An image of the stage, open until `close`: it may go while it is used."""

    def __init__(
        self, digest: bytes, manifest: manifest_pb2.Manifest, folder: Path, closed: Callable[[], object]
    ) -> None:
        """`closed` is called once, by `close`. Raises OSError where a file is gone."""
        self.digest = digest
        self._closed = closed
        self._digests = _digests(manifest)
        self._of_thread = threading.local()
        self._handles: list[int] = []
        try:
            for file in manifest.files:
                self._handles.append(os.open(folder / file.name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._let_go()
            raise

    def close(self) -> None:
        """Nobody may be using it."""
        self._let_go()
        self._closed()

    def _let_go(self) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles = []

    def has_place_of(self, bucket: manifest_pb2.Bucket) -> bool:
        """Whether a bucket lies there here too, of whatever content."""
        return _place(bucket) in self._digests

    def unchanged(self, partial: Partial) -> list[int]:
        """Buckets that are missing there and the same here."""
        buckets = partial.manifest.buckets
        return [at for at in sorted(partial.missing) if self._digests.get(_place(buckets[at])) == buckets[at].digest]

    def copy_unchanged(self, partial: Partial, progress: Progress) -> None:
        """Fills what is unchanged, on all cores."""

        def copy(index: int, _: memoryview) -> None:
            if self.rebuild(partial, index, None):  # not so if this image was altered since: then it is fetched
                partial.mark_good(index)
                progress(partial.bytes_done, partial.bytes_total)

        on_all_cores(self.unchanged(partial), copy, min(usable_cores(), THREADS_MAX))

    def rebuild(self, partial: Partial, index: int, delta: bytes | None) -> bool:
        """Fills bucket `index` with what a delta, if any, makes of the one here; whether that is right. Thread-safe."""
        bucket = partial.manifest.buckets[index]
        room = self._room(bucket.size_bytes)
        if os.preadv(self._handles[bucket.file], [room], bucket.offset) != bucket.size_bytes:
            return False
        try:
            if delta is not None:
                apply_delta(delta, room)
        except BadDelta:
            return False
        return partial.put(index, room)

    def _room(self, size: int) -> memoryview:
        """Of the thread that calls."""
        room: bytearray = getattr(self._of_thread, "room", bytearray())
        if len(room) < size:
            room = self._of_thread.room = bytearray(size)
        return memoryview(room)[:size]


def likeness(one: manifest_pb2.Manifest, other: manifest_pb2.Manifest) -> tuple[int, int]:
    """By which one of several is chosen as a base, more is better: places of buckets in common, and buckets."""
    common = _digests(one)
    shared = [common[_place(bucket)] == bucket.digest for bucket in other.buckets if _place(bucket) in common]
    return len(shared), sum(shared)


def _digests(manifest: manifest_pb2.Manifest) -> dict[Place, bytes]:
    return {_place(bucket): bucket.digest for bucket in manifest.buckets}


def _place(bucket: manifest_pb2.Bucket) -> Place:
    return bucket.file, bucket.offset, bucket.size_bytes
