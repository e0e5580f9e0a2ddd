"""The version that an image on its way here follows, from which what did not change is taken without the wire.

Nothing of it is trusted: each bucket that comes of it is hashed, as any other.
"""

import mmap
import os
from pathlib import Path
from typing import TypeAlias

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.delta import BadDelta, apply_delta
from hotweights.worker_client.image.digests import on_all_cores
from hotweights.worker_client.stage.partial import Partial, Progress

# File, offset, size.
Place: TypeAlias = tuple[int, int, int]


class Base:
    """An image of the stage, mapped: it may go while it is used."""

    def __init__(self, digest: bytes, manifest: manifest_pb2.Manifest, folder: Path) -> None:
        """Raises OSError where a file is gone or has another size."""
        self.digest = digest
        self._digests = _digests(manifest)
        self._views = [_mapped(folder / file.name, file.size_bytes) for file in manifest.files]

    def has_place_of(self, bucket: manifest_pb2.Bucket) -> bool:
        """Whether a bucket lies there here too, of whatever content."""
        return _place(bucket) in self._digests

    def copy_unchanged(self, partial: Partial, progress: Progress) -> None:
        """Fills what is missing and the same here, on all cores."""

        def copy(index: int, _: memoryview) -> None:
            bucket = partial.manifest.buckets[index]
            with partial.view(index) as place:
                place[:] = self._view(bucket)
            if partial.matches(index):  # not so if this image was altered since: then it is fetched
                partial.mark_good(index)
                progress(partial.bytes_done, partial.bytes_total)

        buckets = partial.manifest.buckets
        same = [at for at in sorted(partial.missing) if self._digests.get(_place(buckets[at])) == buckets[at].digest]
        on_all_cores(same, copy)

    def rebuild(self, bucket: manifest_pb2.Bucket, delta: bytes, place: memoryview) -> bool:
        """Fills `place` with what a delta makes of the bucket here. False where it is none for this base."""
        try:
            apply_delta(delta, self._view(bucket), place)
        except BadDelta:
            return False
        return True

    def _view(self, bucket: manifest_pb2.Bucket) -> memoryview:
        return self._views[bucket.file][bucket.offset : bucket.offset + bucket.size_bytes]


def likeness(one: manifest_pb2.Manifest, other: manifest_pb2.Manifest) -> tuple[int, int]:
    """By which one of several is chosen as a base, more is better: places of buckets in common, and buckets."""
    common = _digests(one)
    shared = [common[_place(bucket)] == bucket.digest for bucket in other.buckets if _place(bucket) in common]
    return len(shared), sum(shared)


def _digests(manifest: manifest_pb2.Manifest) -> dict[Place, bytes]:
    return {_place(bucket): bucket.digest for bucket in manifest.buckets}


def _place(bucket: manifest_pb2.Bucket) -> Place:
    return bucket.file, bucket.offset, bucket.size_bytes


def _mapped(path: Path, size_bytes: int) -> memoryview:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_size != size_bytes:
            raise OSError(f"{path.name} has another size than its image says")
        return memoryview(mmap.mmap(handle, size_bytes, prot=mmap.PROT_READ) if size_bytes else b"")
    finally:
        os.close(handle)
