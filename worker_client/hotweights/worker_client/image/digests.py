"""One pass of BLAKE3 over a file gives the digests of its buckets and of its tensors.

    file     |header| tensor a      | tensor b | tensor c ...
    buckets  |---------- 0 ----------|---------- 1 ----------|
    pieces   |--0---|------1--------|-2|--3----|-----4-------|

A third party computes the same digests like this:

1. A file is cut at every multiple of `bucket_bytes` (from its start), and where a tensor begins or
   ends. The bytes between two neighbouring cuts are a **piece**; no piece is empty. A file without
   tensors is cut into buckets only; an empty file has neither.
2. A piece's digest is the 32 bytes of BLAKE3(bytes of the piece), unkeyed.
3. A bucket's digest is BLAKE3(the digests of its pieces, one after the other, in file order). A
   tensor's digest likewise, over its pieces. This holds for a single piece too (a digest of a
   digest); the digest of a tensor without bytes is BLAKE3 of nothing.

So a bucket is verified by itself on arrival, and a tensor compared across versions, at the price of
reading the bytes once.

Files are read, not mapped: they may belong to others, and a file that is truncated while it is
mapped kills the reader. A buffer of 1 MiB stays in the core's cache; from the page cache that ran at
0.98 of BLAKE3 over memory, on 2 threads (256 KiB: 0.90, a mapping: 0.88).
"""

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from io import FileIO
from itertools import pairwise
from typing import NamedTuple, TypeVar

from blake3 import blake3

DIGEST_BYTES = 32
READ_BYTES = 1 << 20

Job = TypeVar("Job")
Progress = Callable[[int, int], None]


class BucketSpan(NamedTuple):
    """A bucket of one file, and the cuts strictly inside it, counted from its start, ascending."""

    offset: int
    size_bytes: int
    cuts: tuple[int, ...]


class ShortFile(OSError):
    """The file ended before the bytes that were asked for."""


def digest_of(data: bytes) -> bytes:
    """BLAKE3 of `data`: 32 bytes. Names manifests, and joins the digests of pieces."""
    return blake3(data).digest()


def hash_pieces(data: memoryview, cuts: Sequence[int]) -> bytes:
    """The digests of the pieces of a bucket, one after the other. `cuts` as in BucketSpan."""
    return b"".join(blake3(data[begin:end]).digest() for begin, end in pairwise((0, *cuts, len(data))))


def hash_bucket(data: memoryview, cuts: Sequence[int]) -> bytes:
    """The digest of a bucket that is in memory: 32 bytes. `cuts` as in BucketSpan."""
    return digest_of(hash_pieces(data, cuts))


class PieceHasher:
    """As hash_pieces, for a bucket whose bytes come one after the other: fastest while they are in the core's cache."""

    def __init__(self, size_bytes: int, cuts: Sequence[int]) -> None:
        self._ends = iter((*cuts, size_bytes))
        self._end = next(self._ends)
        self._hasher, self._position = blake3(), 0
        self._digests: list[bytes] = []

    def update(self, data: memoryview) -> None:
        """With the next bytes, no more than there are."""
        at = 0
        while at < len(data):
            step = min(len(data) - at, self._end - self._position)
            self._hasher.update(data[at : at + step])
            at += step
            self._position += step
            if self._position == self._end:
                self._digests.append(self._hasher.digest())
                self._hasher, self._end = blake3(), next(self._ends, self._end)

    def digests(self) -> bytes:
        """When all bytes have come."""
        return b"".join(self._digests)


def hash_range(file: FileIO, bucket: BucketSpan, buffer: memoryview) -> bytes:
    """As hash_pieces, for a bucket that is in a file, read through `buffer`. Raises ShortFile, OSError."""
    file.seek(bucket.offset)
    hasher, position = PieceHasher(bucket.size_bytes, bucket.cuts), 0
    while position < bucket.size_bytes:
        got = file.readinto(buffer[: min(len(buffer), bucket.size_bytes - position)])
        if not got:
            raise ShortFile(f"the file ends at byte {bucket.offset + position}")
        hasher.update(buffer[:got])
        position += got
    return hasher.digests()


def file_buckets(size_bytes: int, bucket_bytes: int, tensor_spans: Iterable[tuple[int, int]]) -> Iterator[BucketSpan]:
    """The buckets of a file, in order. `tensor_spans` are (offset, size) of its tensors, in any order."""
    edges = sorted({edge for offset, size in tensor_spans for edge in (offset, offset + size)})
    for offset in range(0, size_bytes, bucket_bytes):
        size = min(bucket_bytes, size_bytes - offset)
        inside = edges[bisect_right(edges, offset) : bisect_left(edges, offset + size)]
        yield BucketSpan(offset, size, tuple(edge - offset for edge in inside))


def tensor_digests(
    buckets: Sequence[BucketSpan], pieces: Sequence[bytes], tensor_spans: Iterable[tuple[int, int]]
) -> Iterator[bytes]:
    """The digest of each tensor of a file, in the order given.

    `pieces` has, for each bucket, what hash_pieces gave.
    """
    starts = [bucket.offset + cut for bucket in buckets for cut in (0, *bucket.cuts)]
    joined = b"".join(pieces)
    for offset, size in tensor_spans:
        first, last = bisect_left(starts, offset), bisect_left(starts, offset + size)
        yield digest_of(joined[first * DIGEST_BYTES : last * DIGEST_BYTES])


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Counter:
    """Bytes done, told to a callback by one thread at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._lock = threading.Lock()
        self._done, self._total, self._progress = 0, total, progress

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def on_all_cores(jobs: Sequence[Job], work: Callable[[Job, memoryview], None], threads: int | None = None) -> None:
    """Calls `work(job, buffer)` for every job, each thread with a buffer of its own.

    BLAKE3 and reads let go of the interpreter lock, so threads suffice. Jobs are drawn one by one:
    nothing queues up. The first error stops the others after their present job and is raised.
    """
    remaining = iter(jobs)
    lock = threading.Lock()
    stopped = threading.Event()

    def draw() -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        while not stopped.is_set():
            with lock:
                job = next(remaining, None)
            if job is None:
                return
            work(job, buffer)

    count = max(1, min(threads or usable_cores(), len(jobs)))
    with ThreadPoolExecutor(count, thread_name_prefix="hotweights-hash") as pool:
        drawing = [pool.submit(draw) for _ in range(count)]
        try:
            wait(drawing, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
        for future in drawing:
            future.result()
