"""Whether a manifest from somewhere else may be acted on.

What passes here cannot make us write outside a folder, read outside a file, or trust a byte that no
digest covers. The rest of the code relies on it and checks nothing again.
"""

from collections.abc import Iterable
from itertools import pairwise

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import DIGEST_BYTES, file_buckets
from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.folder import WEIGHTS_SUFFIX, belongs, is_of_draft
from hotweights.worker_client.image.headers import tensor_bytes

FORMAT = "safetensors"
# A bucket is held in memory whole while it is verified.
BUCKET_BYTES_MIN = 1 << 10
BUCKET_BYTES_MAX = 1 << 30

_MANIFEST = "manifest"
_TARGET, _DRAFT = manifest_pb2.COMPONENT_ROLE_TARGET, manifest_pb2.COMPONENT_ROLE_DRAFT


def check_manifest(manifest: manifest_pb2.Manifest, *, allow_code: bool = False) -> None:
    """Raises BadImage, naming the first file and tensor that are not as manifest.proto says.

    `allow_code` lets `*.py` files ride along, for those who asked for them.
    """
    if manifest.format != FORMAT:
        raise BadImage(_MANIFEST, "", f"unknown format {manifest.format!r}")
    check_bucket_bytes(manifest.bucket_bytes)
    if not manifest.tensors:
        raise BadImage(_MANIFEST, "", "no tensor at all")
    _check_files(manifest, allow_code)
    _check_components(manifest)
    _check_tensors(manifest)
    _check_buckets(manifest)


def check_bucket_bytes(bucket_bytes: int) -> None:
    """Raises BadImage for a size that buckets cannot have."""
    if not BUCKET_BYTES_MIN <= bucket_bytes <= BUCKET_BYTES_MAX:
        problem = f"buckets of {bucket_bytes} bytes; {BUCKET_BYTES_MIN} to {BUCKET_BYTES_MAX} are possible"
        raise BadImage(_MANIFEST, "", problem)


def _check_components(manifest: manifest_pb2.Manifest) -> None:
    """A target, and perhaps its draft, which has the files in the folder of that name."""
    roles = [component.role for component in manifest.components]
    if roles not in ([_TARGET], [_TARGET, _DRAFT]):
        raise BadImage(_MANIFEST, "", "its components are not a target, or a target and its draft model")
    if (len(roles) > 1) != any(is_of_draft(file.name) for file in manifest.files):
        raise BadImage(_MANIFEST, "", "has a draft model without files, or files of one that it does not have")


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
    names: set[tuple[int, str]] = set()
    position = (0, 0)
    for tensor in manifest.tensors:
        if tensor.file >= len(manifest.files):
            raise BadImage(_MANIFEST, tensor.name, f"is in file {tensor.file} of {len(manifest.files)}")
        file = manifest.files[tensor.file]
        if not tensor.name or (tensor.component, tensor.name) in names:
            raise BadImage(file.name, tensor.name, "a tensor's name is empty or stands twice")
        names.add((tensor.component, tensor.name))
        _check_tensor(manifest, file, tensor)
        if (tensor.file, tensor.offset) < position:
            raise BadImage(file.name, tensor.name, "overlaps the tensor before it, or is out of order")
        position = (tensor.file, tensor.offset + tensor.size_bytes)


def _check_tensor(manifest: manifest_pb2.Manifest, file: manifest_pb2.ImageFile, tensor: manifest_pb2.Tensor) -> None:
    if not file.weights:
        raise BadImage(file.name, tensor.name, "the file holds no tensors")
    if tensor.component != int(is_of_draft(file.name)):
        raise BadImage(file.name, tensor.name, f"is of component {tensor.component}, which its file is not of")
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
