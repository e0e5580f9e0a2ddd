"""Which bucket is right: the digest of each, over the pieces that the manifest's tensors cut it into."""

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import PieceHasher, digest_of, hash_bucket
from hotweights.worker_client.image.manifest import bucket_cuts


class BucketVerifier:
    """Of a manifest that check_manifest accepted."""

    def __init__(self, manifest: manifest_pb2.Manifest) -> None:
        self._cuts = bucket_cuts(manifest)
        self._digests = [bucket.digest for bucket in manifest.buckets]
        self._sizes = [bucket.size_bytes for bucket in manifest.buckets]

    def matches(self, index: int, data: memoryview) -> bool:
        """Whether `data` is bucket `index`. Lets go of the interpreter lock while it hashes."""
        return hash_bucket(data, self._cuts[index]) == self._digests[index]

    def hasher(self, index: int) -> PieceHasher:
        """For the bytes of bucket `index` as they come."""
        return PieceHasher(self._sizes[index], self._cuts[index])

    def confirms(self, index: int, hasher: PieceHasher) -> bool:
        """Whether what `hasher` was given is bucket `index`."""
        return digest_of(hasher.digests()) == self._digests[index]
