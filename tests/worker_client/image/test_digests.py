"""The digests, computed a second time from the text of the module's docstring alone."""

import io
import random
import threading
from io import FileIO
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3

from hotweights.worker_client.image import digests
from hotweights.worker_client.image.digests import (
    BucketSpan,
    ShortFile,
    file_buckets,
    hash_bucket,
    hash_pieces,
    hash_range,
    on_all_cores,
    tensor_digests,
)


def by_the_book(content: bytes, bucket_bytes: int, begin: int, end: int, spans: list[tuple[int, int]]) -> bytes:
    """The digest of a bucket or tensor that is content[begin:end]: rules 1 to 3, the slow way."""
    cuts = set(range(0, len(content), bucket_bytes)) | {edge for at, size in spans for edge in (at, at + size)}
    inside = sorted({begin, end} | {cut for cut in cuts if begin < cut < end})
    pieces = [content[a:b] for a, b in pairwise(inside)]
    return blake3(b"".join(blake3(piece).digest() for piece in pieces)).digest()


def random_file(seed: int) -> tuple[bytes, int, list[tuple[int, int]]]:
    """Content, a bucket size, and tensors back to back behind a header."""
    chance = random.Random(seed)
    spans, at = [], chance.randrange(8, 200)
    for _ in range(chance.randrange(1, 40)):
        size = chance.choice([0, 1, 2, 7, 64, 1000, 1024, 5000])
        spans.append((at, size))
        at += size
    return chance.randbytes(at), chance.choice([64, 1000, 1024, 4096, 1 << 20]), spans


@pytest.mark.parametrize("seed", range(60))
def test_buckets_and_tensors_have_the_digests_that_the_docstring_describes(seed: int, tmp_path: Path) -> None:
    content, bucket_bytes, spans = random_file(seed)
    path = tmp_path / "file"
    path.write_bytes(content)
    buckets = list(file_buckets(len(content), bucket_bytes, spans))
    pieces = []
    # A buffer of 1500 bytes: pieces both smaller and larger than it, and across its ends.
    with FileIO(path) as file:
        pieces = [hash_range(file, bucket, memoryview(bytearray(1500))) for bucket in reversed(buckets)][::-1]
    for bucket, digests_of_pieces in zip(buckets, pieces, strict=True):
        begin, end = bucket.offset, bucket.offset + bucket.size_bytes
        expected = by_the_book(content, bucket_bytes, begin, end, spans)
        assert blake3(digests_of_pieces).digest() == expected
        assert hash_bucket(memoryview(content)[begin:end], bucket.cuts) == expected
    assert list(tensor_digests(buckets, pieces, spans)) == [
        by_the_book(content, bucket_bytes, at, at + size, spans) for at, size in spans
    ]


def test_buckets_cover_a_file_whole_on_the_grid() -> None:
    assert list(file_buckets(0, 100, [])) == []
    assert list(file_buckets(250, 100, [(10, 90), (100, 130), (230, 20)])) == [
        BucketSpan(0, 100, (10,)),
        BucketSpan(100, 100, ()),
        BucketSpan(200, 50, (30,)),
    ]


def test_the_digest_of_a_single_piece_is_a_digest_of_a_digest_and_of_none_that_of_nothing() -> None:
    data = b"some bytes"
    assert hash_bucket(memoryview(data), ()) == blake3(blake3(data).digest()).digest()
    assert (
        list(tensor_digests([BucketSpan(0, 4, ())], [hash_pieces(memoryview(b"abcd"), ())], [(4, 0), (0, 0)]))
        == [blake3(b"").digest()] * 2
    )


def test_every_flipped_bit_and_every_moved_cut_changes_the_digest() -> None:
    data = bytearray(range(100))
    right = hash_bucket(memoryview(data), (30, 60))
    for at in range(100):
        data[at] ^= 0x10
        assert hash_bucket(memoryview(data), (30, 60)) != right
        data[at] ^= 0x10
    assert hash_bucket(memoryview(data), (30, 61)) != right
    assert hash_bucket(memoryview(data), (30,)) != right


def test_a_file_that_ends_early_is_told_apart_from_wrong_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(150))
    with FileIO(path) as file, pytest.raises(ShortFile, match="ends at byte 150"):
        hash_range(file, BucketSpan(100, 100, ()), memoryview(bytearray(64)))


def test_a_read_that_gives_less_than_asked_for_is_gone_on_with(tmp_path: Path) -> None:
    class Dribble(FileIO):
        def readinto(self, buffer: object) -> int:
            with memoryview(buffer)[:3] as part:  # type: ignore[arg-type]
                return super().readinto(part)

    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with Dribble(path) as file:
        got = hash_range(file, BucketSpan(10, 80, (5, 20)), memoryview(bytearray(16)))
    assert got == hash_pieces(memoryview(bytes(range(10, 90))), (5, 20))


@pytest.mark.parametrize("threads", [1, 2, 7, None])
def test_every_job_is_done_once_whatever_the_number_of_threads(threads: int | None) -> None:
    done: list[int] = []
    on_all_cores(range(100), lambda job, buffer: done.append(job), threads)
    assert sorted(done) == list(range(100))
    on_all_cores([], lambda job, buffer: done.append(job), threads)


def test_the_first_error_ends_the_other_threads_before_their_next_job() -> None:
    done: list[int] = []
    failed = threading.Event()

    def work(job: int, buffer: memoryview) -> None:
        if job == 1:
            failed.set()
            raise io.UnsupportedOperation("no")
        assert failed.wait(10)
        # Long enough for the error to be seen.
        threading.Event().wait(0.05)
        done.append(job)

    with pytest.raises(io.UnsupportedOperation):
        on_all_cores(range(1000), work, 3)
    assert len(done) < 20


def test_cores_are_those_this_process_may_use() -> None:
    assert digests.usable_cores() >= 1
