"""What comes with an image: manifests, their pages, safetensors headers."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from tests.fuzz.kinds import Cursor, Target, parts

from hotweights.coordinator.rules import Declined
from hotweights.coordinator.service import coordinator as service
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image import BadImage, join_pages, manifest_digest, parse_manifest
from hotweights.worker_client.image.headers import read_header
from hotweights.worker_client.image.manifest import bucket_cuts
from hotweights.worker_client.image.paging import PageJoiner, pages

_folder: Path | None = None


def _file() -> Path:
    """One file, written anew each time."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="hw-fuzz-"))
    return _folder / "model.safetensors"


def forget_files() -> None:
    """What this module left on the machine."""
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder)
        _folder = None


def manifests(data: bytes) -> None:
    """The worker side accepts only what it can walk; the coordinator, only what it can show."""
    with suppress(BadImage):
        manifest = parse_manifest(data)
        assert len(bucket_cuts(manifest)) == len(manifest.buckets)
        assert sum(tensor.size_bytes for tensor in manifest.tensors) <= sum(file.size_bytes for file in manifest.files)
        assert join_pages(pages(data), manifest_digest(data)) == data
    header = pb.PublishHeader(model="m", version="v", manifest_digest=manifest_digest(data))
    with suppress(Declined):
        manifest, digest = service._checked_manifest(header, data)
        size = sum(file.size_bytes for file in manifest.files)
        pb.GetVersionResponse().version.image_bytes = size
        assert digest == manifest_digest(data).hex()


def paging(data: bytes) -> None:
    """Pages in any order and number, to both who join them."""
    cursor = Cursor(data)
    arrived = []
    while not cursor.is_done:
        index, count = cursor.number(256), cursor.number(256)
        arrived.append(manifest_pb2.ManifestPage(index=index, count=count, data=cursor.part()))
    whole = b"".join(page.data for page in arrived)
    joiner = PageJoiner()
    with suppress(BadImage):
        for page in arrived:
            joiner.add(page)
        assert joiner.blob(manifest_digest(whole)) == whole
    with suppress(Declined):
        _, blob = asyncio.run(_publication(arrived))
        assert blob == whole


async def _publication(arrived: list[manifest_pb2.ManifestPage]) -> tuple[pb.PublishHeader, bytes]:
    async def stream() -> AsyncIterator[pb.PublishVersionRequest]:
        yield pb.PublishVersionRequest(header=pb.PublishHeader(model="m"))
        for page in arrived:
            yield pb.PublishVersionRequest(page=page)

    return await service._read_publication(stream())


def headers(data: bytes) -> None:
    """What we accept, the format's own library accepts, with the same tensors in the same places."""
    _file().write_bytes(data)
    try:
        header = read_header(_file())
    except BadImage:
        return
    try:
        theirs: dict[str, Any] = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AssertionError(f"we accept it, safetensors does not: {error}") from error
    assert theirs.keys() == {tensor.name for tensor in header.tensors}
    for tensor in header.tensors:
        shown = theirs[tensor.name]
        assert (shown["dtype"], tuple(shown["shape"])) == (tensor.dtype, tensor.shape)
        assert bytes(shown["data"]) == data[tensor.offset : tensor.offset + tensor.size_bytes]


def _good_manifest() -> bytes:
    manifest = manifest_pb2.Manifest(format="safetensors", bucket_bytes=1024)
    manifest.components.add(name="target", role=manifest_pb2.COMPONENT_ROLE_TARGET)
    manifest.files.add(name="config.json", size_bytes=2)
    manifest.files.add(name="model.safetensors", size_bytes=1500, weights=True)
    manifest.tensors.add(name="a", dtype="F32", shape=[5, 7], file=1, offset=100, size_bytes=140, digest=b"\7" * 32)
    manifest.tensors.add(name="b", dtype="U8", shape=[10], file=1, offset=240, size_bytes=10, digest=b"\7" * 32)
    manifest.buckets.add(file=0, offset=0, size_bytes=2, digest=b"\1" * 32)
    manifest.buckets.add(file=1, offset=0, size_bytes=1024, digest=b"\2" * 32)
    manifest.buckets.add(file=1, offset=1024, size_bytes=476, digest=b"\3" * 32)
    return manifest.SerializeToString(deterministic=True)


def _huge_manifest() -> bytes:
    """Files whose sizes together are no 64-bit number."""
    manifest = manifest_pb2.Manifest.FromString(_good_manifest())
    for file in manifest.files:
        file.size_bytes = (1 << 64) - 1
    return manifest.SerializeToString(deterministic=True)


def _page(index: int, count: int, data: bytes) -> bytes:
    return bytes([index, count]) + parts(data)


def _file_of(header: str, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def _odd_headers() -> list[bytes]:
    """What Python's reader of JSON takes and the format does not, or only a 64-bit count of it."""
    entry = '{"dtype":"U8","shape":%s,"data_offsets":[0,0]}'
    shapes = (f"[0,{1 << 70}]", f"[{1 << 63},4,0]", f"[0,{(1 << 64) - 1}]")
    return [
        *(_file_of('{"a":' + entry % shape + "}") for shape in shapes),
        _file_of(r'{"\ud800":' + entry % "[0]" + "}"),
        _file_of(r'{"__metadata__":{"\ud800":"\udfff"}}'),
        _file_of('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":NaN}}'),
    ]


def _checkpoint() -> bytes:
    tensors: dict[str, Any] = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.uint8)}
    tensors["empty"] = np.zeros((0, 4), np.float16)
    return save(tensors, metadata={"format": "pt"})


TARGETS = {
    "manifests": Target(manifests, lambda: [_good_manifest(), _huge_manifest(), b""]),
    "paging": Target(
        paging,
        lambda: [_page(0, 1, b"abc"), _page(0, 2, b"abc") + _page(1, 2, b"de"), _page(1, 2, b"x"), _page(0, 0, b"")],
        mutations=500,
    ),
    "headers": Target(headers, lambda: [_checkpoint(), b"\2" + bytes(7) + b"{}", b"\xff" * 8, *_odd_headers()]),
}
