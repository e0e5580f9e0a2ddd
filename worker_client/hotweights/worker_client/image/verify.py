"""Proves a folder against a manifest, bucket by bucket: for a person who asks, and to resume a staging."""

from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import (
    BucketSpan,
    Counter,
    Progress,
    ShortFile,
    digest_of,
    hash_range,
    on_all_cores,
)
from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.folder import locate
from hotweights.worker_client.image.manifest import bucket_cuts

TENSORS_NAMED_MAX = 3


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, or with one bucket of it. `tensors` are those it touches."""

    file: str
    text: str
    offset: int = 0
    size_bytes: int = 0
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.tensors:
            return f"{self.file}: {self.text}"
        named = ", ".join(self.tensors[:TENSORS_NAMED_MAX])
        more = len(self.tensors) - TENSORS_NAMED_MAX
        return f"{self.file}: {self.text} (in {named}{f' and {more} more' if more > 0 else ''})"


@dataclass(frozen=True)
class Verified:
    """What was found. `good` are the indices of the buckets whose bytes are the manifest's."""

    good: frozenset[int]
    problems: tuple[Problem, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_folder(
    folder: Path,
    manifest: manifest_pb2.Manifest,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Verified:
    """Hashes what is there. `manifest` has passed check_manifest; `progress` as in build_manifest.

    A file that is missing or of another size is one problem, a bucket with other bytes is one. A
    short file's buckets that are right still count as good. Raises OSError for a file that cannot be read.
    """
    paths, problems = _find_files(folder, manifest)
    cuts = bucket_cuts(manifest)
    good: set[int] = set()
    wrong: set[int] = set()
    jobs = [index for index, bucket in enumerate(manifest.buckets) if bucket.file in paths]
    counter = Counter(sum(manifest.buckets[index].size_bytes for index in jobs), progress)

    def work(index: int, buffer: memoryview) -> None:
        bucket = manifest.buckets[index]
        try:
            with FileIO(paths[bucket.file]) as file:
                pieces = hash_range(file, BucketSpan(bucket.offset, bucket.size_bytes, cuts[index]), buffer)
            right = digest_of(pieces) == bucket.digest
        except ShortFile:
            right = False
        (good if right else wrong).add(index)
        counter.add(bucket.size_bytes)

    on_all_cores(jobs, work, threads)
    problems.extend(_bad_bucket(manifest, index) for index in sorted(wrong))
    return Verified(frozenset(good), tuple(problems))


def _find_files(folder: Path, manifest: manifest_pb2.Manifest) -> tuple[dict[int, Path], list[Problem]]:
    paths: dict[int, Path] = {}
    problems: list[Problem] = []
    for number, file in enumerate(manifest.files):
        try:
            paths[number] = locate(folder, file.name)
        except BadImage as bad:
            problems.append(Problem(file.name, bad.problem))
            continue
        size = paths[number].stat().st_size
        if size != file.size_bytes:
            problems.append(Problem(file.name, f"has {size} bytes instead of {file.size_bytes}"))
    return paths, problems


def _bad_bucket(manifest: manifest_pb2.Manifest, index: int) -> Problem:
    bucket = manifest.buckets[index]
    end = bucket.offset + bucket.size_bytes
    tensors = tuple(
        tensor.name
        for tensor in manifest.tensors
        if tensor.size_bytes
        and tensor.file == bucket.file
        and tensor.offset < end
        and bucket.offset < tensor.offset + tensor.size_bytes
    )
    text = f"bytes {bucket.offset} to {end} are not the ones that were published"
    return Problem(manifest.files[bucket.file].name, text, bucket.offset, bucket.size_bytes, tensors)
