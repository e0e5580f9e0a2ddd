"""Images: a version's bytes as a Hugging Face safetensors folder, and the manifest that names them.

    folder --folder.py--> files --headers.py--> tensors --digests.py--> digests --manifest.py--> Image
                                                                                        |
              paging.py carries its manifest, reader.py serves its ranges, verify.py proves a folder

No gRPC and no torch here: the same code runs in agents, in publishers and in the command line.
"""

from hotweights.worker_client.image.checks import check_manifest
from hotweights.worker_client.image.digests import hash_bucket
from hotweights.worker_client.image.errors import BadImage, FolderChanged, ImageError, ModelNotFound
from hotweights.worker_client.image.folder import list_files, resolve_model
from hotweights.worker_client.image.headers import read_header
from hotweights.worker_client.image.manifest import (
    BUCKET_BYTES,
    Image,
    bucket_cuts,
    build_manifest,
    open_image,
    parse_manifest,
)
from hotweights.worker_client.image.paging import PageJoiner, join_pages, manifest_digest, pages
from hotweights.worker_client.image.reader import BucketReader
from hotweights.worker_client.image.stamps import Stamp, read_stamp
from hotweights.worker_client.image.verify import Problem, Verified, verify_folder

__all__ = [
    "BUCKET_BYTES",
    "BadImage",
    "BucketReader",
    "FolderChanged",
    "Image",
    "ImageError",
    "ModelNotFound",
    "PageJoiner",
    "Problem",
    "Stamp",
    "Verified",
    "bucket_cuts",
    "build_manifest",
    "check_manifest",
    "hash_bucket",
    "join_pages",
    "list_files",
    "manifest_digest",
    "open_image",
    "pages",
    "parse_manifest",
    "read_header",
    "read_stamp",
    "resolve_model",
    "verify_folder",
]
