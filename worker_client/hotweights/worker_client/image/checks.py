"""Whether a manifest from somewhere else may be acted on.

What passes here cannot make us write outside a folder, read outside a file, or trust a byte that no
digest covers. The rest of the code relies on it and checks nothing again.
"""

from collections.abc import Iterable
from itertools import pairwise

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import DIGEST_BYTES, file_buckets
from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.folder import WEIGHTS_SUFFIX, belongs
from hotweights.worker_client.image.headers import tensor_bytes

FORMAT = "safetensors"
# A bucket is held in memory whole while it is verified.
BUCKET_BYTES_MIN = 1 << 10
BUCKET_BYTES_MAX = 1 << 30

_MANIFEST = "manifest"


def check_manifest(manifest: manifest_pb2.Manifest, *, allow_code: bool = False) -> None:
    """Raises BadImage, naming the first file and tensor that are not as manifest.proto says.

    `allow_code` lets `*.py` files ride along, for those who asked for them.
    """
    if manifest.format != FORMAT:
        raise BadImage(_MANIFEST, "", f"unknown format {manifest.format!r}")
    check_bucket_bytes(manifest.bucket_bytes)
    if not manifest.components:
        raise BadImage(_MANIFEST, "", "has no component")
    if not manifest.tensors:
        raise BadImage(_MANIFEST, "", "no tensor at all")
    _check_files(manifest, allow_code)
    _check_tensors(manifest)
    _check_buckets(manifest)


def check_bucket_bytes(bucket_bytes: int) -> None:
    """Raises BadImage for a size that buckets cannot have."""
    if not BUCKET_BYTES_MIN <= bucket_bytes <= BUCKET_BYTES_MAX:
        problem = f"buckets of {bucket_bytes} bytes; {BUCKET_BYTES_MIN} to {BUCKET_BYTES_MAX} are possible"
        raise BadImage(_MANIFEST, "", problem)


def _check_files(manifest: manifest_pb2.Manifest, allow_code: bool) -> None:
    for file in manifest.files:
        if not belongs(file.name, include_code=True):
            raise BadImage(repr(file.name), "", "is no plain name of a file that images have")
        if not allow_code and not belongs(file.name, include_code=False):
            raise BadImage(file.name, "", "is code, which was not asked for")
        if file.weights != file.name.endswith(WEIGHTS_SUFFIX):
            raise BadImage(file.name, "", f"only *{WEIGHTS_SUFFIX} files hold tensors, and all of them do")
    for before, file in pairwise(manifest.files):
        if file.name <= before.name:
            raise BadImage(file.name, "", "files are not in order of their names, each once")


def _check_tensors(manifest: manifest_pb2.Manifest) -> None:
    names: set[str] = set()
    position = (0, 0)
    for tensor in manifest.tensors:
        if tensor.file >= len(manifest.files):
            raise BadImage(_MANIFEST, tensor.name, f"is in file {tensor.file} of {len(manifest.files)}")
        file = manifest.files[tensor.file]
        if not tensor.name or tensor.name in names:
            raise BadImage(file.name, tensor.name, "a tensor's name is empty or stands twice")
        names.add(tensor.name)
        _check_tensor(manifest, file, tensor)
        if (tensor.file, tensor.offset) < position:
            raise BadImage(file.name, tensor.name, "overlaps the tensor before it, or is out of order")
        position = (tensor.file, tensor.offset + tensor.size_bytes)


def _check_tensor(manifest: manifest_pb2.Manifest, file: manifest_pb2.ImageFile, tensor: manifest_pb2.Tensor) -> None:
    if not file.weights:
        raise BadImage(file.name, tensor.name, "the file holds no tensors")
    if tensor.component >= len(manifest.components):
        raise BadImage(file.name, tensor.name, f"is of component {tensor.component} of {len(manifest.components)}")
    if len(tensor.digest) != DIGEST_BYTES:
        raise BadImage(file.name, tensor.name, f"a digest of {len(tensor.digest)} bytes")
    try:
        expected = tensor_bytes(tensor.dtype, tensor.shape)
    except ValueError as problem:
        raise BadImage(file.name, tensor.name, str(problem)) from None
    if tensor.size_bytes != expected:
        raise BadImage(file.name, tensor.name, f"has {tensor.size_bytes} bytes, its shape and dtype {expected}")
    if tensor.offset + tensor.size_bytes > file.size_bytes:
        raise BadImage(file.name, tensor.name, f"reaches beyond the file's {file.size_bytes} bytes")


def _check_buckets(manifest: manifest_pb2.Manifest) -> None:
    buckets: Iterable[manifest_pb2.Bucket] = iter(manifest.buckets)
    total = sum(-(-file.size_bytes // manifest.bucket_bytes) for file in manifest.files)
    # Counted before the files are walked: a file said to be of 2^63 bytes must cost nothing.
    if total != len(manifest.buckets):
        raise BadImage(_MANIFEST, "", f"has {len(manifest.buckets)} buckets where its files need {total}")
    due = (
        (number, span.offset, span.size_bytes)
        for number, file in enumerate(manifest.files)
        for span in file_buckets(file.size_bytes, manifest.bucket_bytes, ())
    )
    for bucket, (number, offset, size_bytes) in zip(buckets, due, strict=True):
        name = manifest.files[number].name
        if (bucket.file, bucket.offset, bucket.size_bytes) != (number, offset, size_bytes):
            raise BadImage(name, "", f"a bucket is not the {size_bytes} bytes from {offset} on that were due")
        if len(bucket.digest) != DIGEST_BYTES:
            raise BadImage(name, "", f"the bucket at {offset} has a digest of {len(bucket.digest)} bytes")
