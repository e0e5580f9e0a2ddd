"""From a folder to an Image: its files hashed once, its manifest, and the promise that it has not changed.

    list_files -> stamp -> read_header -> hash all buckets -> stamps again -> Manifest -> blob -> digest

The blob is the serialised Manifest, fields in number order; its BLAKE3 names the version's content
everywhere. It is made once, by the publisher, and passed on as it is: nobody serialises it again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from google.protobuf.message import DecodeError

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.checks import FORMAT, check_bucket_bytes, check_manifest
from hotweights.worker_client.image.digests import (
    BucketSpan,
    Counter,
    Progress,
    ShortFile,
    digest_of,
    file_buckets,
    hash_range,
    on_all_cores,
    tensor_digests,
)
from hotweights.worker_client.image.errors import BadImage, FolderChanged
from hotweights.worker_client.image.folder import DRAFT, INDEX, FolderFile, is_of_draft, list_files, locate, read_index
from hotweights.worker_client.image.headers import TensorSpan, read_header
from hotweights.worker_client.image.stamps import Stamp, read_stamp, stamp_of

BUCKET_BYTES = 16 << 20
"""Of a large image."""
SMALLEST_BUCKET_BYTES = 512 << 10
BUCKETS = 512
"""An image has about so many: a chain of N nodes takes (BUCKETS + N - 1) / BUCKETS of the time of one."""


@dataclass(frozen=True)
class Image:
    """A folder whose content is known. `stamps` and `paths` are one a file, in the manifest's order."""

    folder: Path
    manifest: manifest_pb2.Manifest = field(repr=False)
    blob: bytes = field(repr=False)
    digest: bytes
    stamps: tuple[Stamp, ...] = field(repr=False)
    paths: tuple[Path, ...] = field(repr=False)
    """Links followed, when the content was hashed; `path` follows them now."""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.manifest.files)

    def path(self, file: int) -> Path:
        """Where the bytes of the manifest's file `file` are. Raises BadImage if that is gone."""
        return locate(self.folder, self.manifest.files[file].name)

    def check_unchanged(self) -> None:
        """Raises FolderChanged if a file is not the one that was hashed."""
        for file, stamp in zip(self.manifest.files, self.stamps, strict=True):
            _expect(self.folder, file.name, stamp)


@dataclass
class _Entry:
    """A file on its way into the manifest."""

    file: FolderFile
    stamp: Stamp
    tensors: tuple[TensorSpan, ...]
    buckets: list[BucketSpan] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)  # hash_pieces of each bucket, filled in any order

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(tensor.offset, tensor.size_bytes) for tensor in self.tensors]


def build_manifest(
    folder: Path,
    *,
    bucket_bytes: int | None = None,
    include_code: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Image:
    """Hashes the folder's files with all cores (or `threads`). Blocks: call it in a thread.

    Without `bucket_bytes` they are about a five-hundredth of the image, a power of two: the same for the same bytes.
    `progress(bytes_done, bytes_total)` is called after each bucket, from the hashing threads but
    never by two at once; what it raises ends the hashing and is raised here. Raises BadImage,
    FolderChanged, OSError.
    """
    folder = folder.resolve()
    files = list_files(folder, include_code=include_code)
    if bucket_bytes is None:
        bucket_bytes = _bucket_bytes(sum(file.path.stat().st_size for file in files))
    check_bucket_bytes(bucket_bytes)
    entries = [_read_entry(file, bucket_bytes) for file in files]
    _check_tensors(folder, entries)
    _hash_entries(folder, entries, progress, threads)
    for entry in entries:
        _expect(folder, entry.file.name, entry.stamp)
    manifest = _fill_manifest(entries, bucket_bytes)
    check_manifest(manifest, allow_code=include_code)  # what others would refuse is not published
    blob = manifest.SerializeToString(deterministic=True)
    stamps, paths = tuple(entry.stamp for entry in entries), tuple(entry.file.path for entry in entries)
    return Image(folder, manifest, blob, digest_of(blob), stamps, paths)


def _bucket_bytes(image_bytes: int) -> int:
    """For an image of this size."""
    wanted = 1 << max(0, -(-image_bytes // BUCKETS) - 1).bit_length()
    return min(max(wanted, SMALLEST_BUCKET_BYTES), BUCKET_BYTES)


def open_image(folder: Path, blob: bytes, *, allow_code: bool = False) -> Image:
    """The Image of a folder that is known to match `blob` (staged here, or just verified); hashes nothing.

    Raises BadImage when the manifest is not sound, FolderChanged when a file is missing or of another size.
    """
    folder = folder.resolve()
    manifest = parse_manifest(blob, allow_code=allow_code)
    stamps, paths = [], []
    for file in manifest.files:
        found = _find_now(folder, file.name)
        if found is None or found[1].size_bytes != file.size_bytes:
            raise FolderChanged(folder, file.name)
        paths.append(found[0])
        stamps.append(found[1])
    return Image(folder, manifest, blob, digest_of(blob), tuple(stamps), tuple(paths))


def parse_manifest(blob: bytes, *, allow_code: bool = False) -> manifest_pb2.Manifest:
    """The manifest in `blob`, checked as check_manifest does. Raises BadImage."""
    try:
        manifest = manifest_pb2.Manifest.FromString(blob)
    except DecodeError:
        raise BadImage("manifest", "", "is not a serialised Manifest") from None
    check_manifest(manifest, allow_code=allow_code)
    return manifest


def bucket_cuts(manifest: manifest_pb2.Manifest) -> list[tuple[int, ...]]:
    """The cuts of each bucket, as hash_bucket wants them. One walk over all tensors."""
    spans: list[list[tuple[int, int]]] = [[] for _ in manifest.files]
    for tensor in manifest.tensors:
        spans[tensor.file].append((tensor.offset, tensor.size_bytes))
    return [
        bucket.cuts
        for file, inside in zip(manifest.files, spans, strict=True)
        for bucket in file_buckets(file.size_bytes, manifest.bucket_bytes, inside)
    ]


def _read_entry(file: FolderFile, bucket_bytes: int) -> _Entry:
    stamp = read_stamp(file.path)
    tensors = read_header(file.path, file.name).tensors if file.weights else ()
    entry = _Entry(file, stamp, tensors)
    entry.buckets.extend(file_buckets(stamp.size_bytes, bucket_bytes, entry.spans))
    entry.pieces.extend([b""] * len(entry.buckets))
    return entry


def _check_tensors(folder: Path, entries: Iterable[_Entry]) -> None:
    """A tensor is in one file only of its component, and where the index says."""
    for prefix, of_draft in (("", False), (f"{DRAFT}/", True)):
        own = [entry for entry in entries if is_of_draft(entry.file.name) is of_draft]
        homes: dict[str, str] = {}
        for entry in own:
            for tensor in entry.tensors:
                if tensor.name in homes:
                    raise BadImage(entry.file.name, tensor.name, f"is in {homes[tensor.name]} too")
                homes[tensor.name] = entry.file.name
        if not homes and own:
            raise BadImage(
                prefix.removesuffix("/") or folder.name, "", "no tensor at all: every *.safetensors is empty"
            )
        index = prefix + INDEX
        if any(entry.file.name == index for entry in own):
            for name, file in read_index(folder, index).items():
                if homes.get(name) != file:
                    raise BadImage(file, name, f"{index} says it is here, but it is not")


def _hash_entries(folder: Path, entries: list[_Entry], progress: Progress | None, threads: int | None) -> None:
    jobs = [(entry, number) for entry in entries for number in range(len(entry.buckets))]
    counter = Counter(sum(entry.stamp.size_bytes for entry in entries), progress)

    def work(job: tuple[_Entry, int], buffer: memoryview) -> None:
        entry, number = job
        bucket = entry.buckets[number]
        try:
            with FileIO(entry.file.path) as file:
                if stamp_of(file) != entry.stamp:
                    raise FolderChanged(folder, entry.file.name)
                entry.pieces[number] = hash_range(file, bucket, buffer)
        except (ShortFile, FileNotFoundError):
            raise FolderChanged(folder, entry.file.name) from None
        counter.add(bucket.size_bytes)

    on_all_cores(jobs, work, threads)


def _fill_manifest(entries: list[_Entry], bucket_bytes: int) -> manifest_pb2.Manifest:
    manifest = manifest_pb2.Manifest(format=FORMAT, bucket_bytes=bucket_bytes)
    manifest.components.add(name="target", role=manifest_pb2.COMPONENT_ROLE_TARGET)
    if any(is_of_draft(entry.file.name) for entry in entries):
        manifest.components.add(name=DRAFT, role=manifest_pb2.COMPONENT_ROLE_DRAFT)
    for number, entry in enumerate(entries):
        manifest.files.add(name=entry.file.name, size_bytes=entry.stamp.size_bytes, weights=entry.file.weights)
        digests = tensor_digests(entry.buckets, entry.pieces, entry.spans)
        for tensor, digest in zip(entry.tensors, digests, strict=True):
            manifest.tensors.add(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                file=number,
                offset=tensor.offset,
                size_bytes=tensor.size_bytes,
                digest=digest,
                component=int(is_of_draft(entry.file.name)),
            )
        for bucket, pieces in zip(entry.buckets, entry.pieces, strict=True):
            manifest.buckets.add(
                file=number, offset=bucket.offset, size_bytes=bucket.size_bytes, digest=digest_of(pieces)
            )
    return manifest


def _expect(folder: Path, name: str, stamp: Stamp) -> None:
    found = _find_now(folder, name)
    if found is None or found[1] != stamp:
        raise FolderChanged(folder, name)


def _find_now(folder: Path, name: str) -> tuple[Path, Stamp] | None:
    try:
        path = locate(folder, name)
        return path, read_stamp(path)
    except (BadImage, FileNotFoundError):  # gone, or no longer a plain file of the folder
        return None
