"""Manifests in pages: what is put together is what was taken apart, or refused."""

import pytest

from hotweights.v1 import manifest_pb2
from hotweights.wire import channel
from hotweights.worker_client.image import paging
from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.paging import PageJoiner, join_pages, manifest_digest, pages

MIB = 1 << 20
BLOB = bytes(range(256)) * (3 * MIB // 256) + b"tail"
DIGEST = manifest_digest(BLOB)


def test_the_limits_are_those_of_the_wire() -> None:
    assert paging.PAGE_BYTES_MAX == channel.PAGE_BYTES_MAX
    assert paging.MANIFEST_BYTES_MAX == channel.MANIFEST_BYTES_MAX


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, len(BLOB)])
def test_pages_put_together_are_the_blob(size: int) -> None:
    blob = BLOB[:size]
    cut = list(pages(blob))
    assert [page.index for page in cut] == list(range(-(-size // MIB)))
    assert {page.count for page in cut} == {len(cut)}
    assert all(0 < len(page.data) <= MIB for page in cut)
    assert join_pages(cut, manifest_digest(blob)) == blob


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ([], "0 of 0 pages"),
        ([0, 1, 2], "3 of 4 pages"),
        ([1, 0, 2, 3], "page 1 came where 0"),
        ([0, 1, 1, 2, 3], "page 1 came where 2"),
        ([0, 1, 2, 3, 3], "page 3 came where 4 of 4"),
    ],
)
def test_pages_missing_twice_or_out_of_order_are_refused(order: list[int], problem: str) -> None:
    cut = list(pages(BLOB))
    with pytest.raises(BadImage, match=problem):
        join_pages([cut[index] for index in order], DIGEST)


def test_bytes_that_are_not_those_of_the_digest_are_refused() -> None:
    cut = list(pages(BLOB))
    cut[2].data = b"x" + cut[2].data[1:]
    with pytest.raises(BadImage, match=f"not {DIGEST.hex()}"):
        join_pages(cut, DIGEST)


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (manifest_pb2.ManifestPage(index=0, count=257, data=b"x"), "257 pages"),
        (manifest_pb2.ManifestPage(index=0, count=0, data=b"x"), "0 pages"),
        (manifest_pb2.ManifestPage(index=0, count=2, data=b""), "has 0 bytes"),
        (manifest_pb2.ManifestPage(index=0, count=2, data=bytes(MIB + 1)), "bytes"),
    ],
)
def test_a_page_beyond_the_limits_is_refused_on_arrival(page: manifest_pb2.ManifestPage, problem: str) -> None:
    with pytest.raises(BadImage, match=problem):
        PageJoiner().add(page)


def test_a_page_that_counts_otherwise_than_the_first_is_refused() -> None:
    joiner = PageJoiner()
    joiner.add(manifest_pb2.ManifestPage(index=0, count=2, data=b"x"))
    with pytest.raises(BadImage, match="3 pages"):
        joiner.add(manifest_pb2.ManifestPage(index=1, count=3, data=b"x"))


@pytest.mark.parametrize("size", [0, paging.MANIFEST_BYTES_MAX + 1])
def test_a_manifest_that_no_reader_would_take_is_not_sent(size: int) -> None:
    with pytest.raises(BadImage, match="are possible"):
        next(pages(bytes(size)))
