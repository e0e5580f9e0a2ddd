"""An image on its way into the stage: filled bucket by bucket, each one verified in place.

    absent --create--> partial --allocated, ahead of who fills it--> --every bucket right--> complete, 0440, renamed

Nothing is written to a map before the file has its pages there: a sparse file on a full tmpfs kills whoever touches it.

What a former agent left is kept: its buckets are hashed where they lie, and only the missing and
the wrong ones are fetched again.
"""

import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from hotweights.v1 import manifest_pb2
from hotweights.wire import failpoints
from hotweights.worker_client.image.verify import verify_folder
from hotweights.worker_client.stage.buckets import BucketVerifier

Progress = Callable[[int, int], None]

_PIECE_BYTES = 64 << 20  # gets its pages at once


def image_bytes(manifest: manifest_pb2.Manifest) -> int:
    """Bytes of all files."""
    return sum(file.size_bytes for file in manifest.files)


class Partial:
    """Writable maps of an image's files. Close it before the files are renamed or removed."""

    def __init__(self, folder: Path, digest: bytes, manifest: manifest_pb2.Manifest) -> None:
        self.folder = folder
        self.digest = digest
        self.manifest = manifest
        self.missing: set[int] = set(range(len(manifest.buckets)))
        self.bytes_total = image_bytes(manifest)
        self.bytes_done = 0
        self._lock = threading.Lock()
        self._views: list[memoryview] = []
        self._allocated = [0] * len(manifest.files)
        self.verifier = BucketVerifier(manifest)
        self._first_of: dict[int, int] = {}
        for index, bucket in enumerate(manifest.buckets):
            self._first_of.setdefault(bucket.file, index)

    def create(self) -> bool:
        """Makes every file at its full size, its pages to come, and maps it; whether there was something to resume.

        Raises OSError.
        """
        resumed = self.folder.is_dir()
        for folder in sorted({(self.folder / file.name).parent for file in self.manifest.files} | {self.folder}):
            folder.mkdir(mode=0o700, exist_ok=True)
        handles: list[int] = []
        try:
            for file in self.manifest.files:
                handle = os.open(
                    self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode=0o600
                )
                handles.append(handle)
                _set_size(handle, file.size_bytes)
            for handle, file in zip(handles, self.manifest.files, strict=True):
                # The view keeps its map alive; an empty file cannot be mapped.
                self._views.append(memoryview(mmap.mmap(handle, file.size_bytes) if file.size_bytes else b""))
        finally:
            for handle in handles:
                os.close(handle)
        return resumed

    def allocate(self, advanced: Callable[[], object] = lambda: None, stop: Callable[[], bool] = lambda: False) -> None:
        """Takes the room for all files, in their order; `advanced` is called whenever there is more of it.

        Blocks, long for a large image. Raises OSError (ENOSPC); ends early once `stop()`.
        """
        for number, file in enumerate(self.manifest.files):
            handle = os.open(self.folder / file.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for at in range(0, file.size_bytes, _PIECE_BYTES):
                    if stop():
                        return
                    size = min(_PIECE_BYTES, file.size_bytes - at)
                    if sys.platform != "darwin":  # where _set_size took it
                        os.posix_fallocate(handle, at, size)
                    self._allocated[number] = at + size
                    advanced()
            finally:
                os.close(handle)

    def has_room(self, index: int) -> bool:
        """Whether bucket `index` may be written where it goes."""
        bucket = self.manifest.buckets[index]
        return bucket.offset + bucket.size_bytes <= self._allocated[bucket.file]

    def scan(self, progress: Progress | None = None) -> None:
        """Counts what is right already, with all cores. What `progress` raises ends it."""
        for index in verify_folder(self.folder, self.manifest, progress=progress).good:
            self.mark_good(index)

    def view(self, index: int) -> memoryview:
        """Where bucket `index` goes."""
        bucket = self.manifest.buckets[index]
        return self._views[bucket.file][bucket.offset : bucket.offset + bucket.size_bytes]

    def held(self, file: int, offset: int, size: int) -> memoryview | None:
        """A range within one bucket that is right already, to be read; None while it is not.

        Thread-safe. Raises IndexError for a range that no bucket has.
        """
        index = self._first_of.get(file, len(self.manifest.buckets)) + offset // self.manifest.bucket_bytes
        bucket = self.manifest.buckets[index]
        if bucket.file != file or not bucket.offset <= offset < offset + size <= bucket.offset + bucket.size_bytes:
            raise IndexError(f"{size} bytes from {offset} on of file {file} are in no bucket")
        with self._lock:
            views = self._views  # empty once closed
            return views[file][offset : offset + size].toreadonly() if views and index not in self.missing else None

    def matches(self, index: int) -> bool:
        """Whether the bytes in place are the bucket's. Thread-safe; releases the GIL while hashing."""
        with self.view(index) as data:
            return self.verifier.matches(index, data)

    def put(self, index: int, data: memoryview) -> bool:
        """Writes `data` where bucket `index` goes if it is that bucket; whether it is. Thread-safe. Raises OSError."""
        if not self.verifier.matches(index, data):
            return False
        bucket = self.manifest.buckets[index]
        path = self.folder / self.manifest.files[bucket.file].name
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            at = 0
            while at < len(data):
                at += os.pwrite(handle, data[at:], bucket.offset + at)
        finally:
            os.close(handle)
        return True

    def mark_good(self, index: int) -> None:
        """Counts a bucket that `matches`. Thread-safe."""
        with self._lock:
            if index not in self.missing:
                return
            self.missing.discard(index)
            self.bytes_done += self.manifest.buckets[index].size_bytes
            right = len(self.manifest.buckets) - len(self.missing)
        failpoints.hit("stage.bucket", right)

    def close(self) -> None:
        """Lets go of the maps. The last reference unmaps; the traceback of a cancelled read may hold it."""
        self._views = []


def _set_size(handle: int, size_bytes: int) -> None:
    """Without pages where the system can give them later: macOS has no posix_fallocate, zeros are written there."""
    have = os.fstat(handle).st_size
    if sys.platform != "darwin" or have > size_bytes:
        os.ftruncate(handle, size_bytes)
    zeros = bytes(1 << 20) if have < size_bytes and sys.platform == "darwin" else b""
    while zeros and have < size_bytes:
        have += os.pwrite(handle, zeros[: size_bytes - have], have)
