"""A manifest in pages: a million tensors make a message that no gRPC limit lets through in one piece."""

from collections.abc import Iterable, Iterator

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import digest_of
from hotweights.worker_client.image.errors import BadImage

# As hotweights.wire.channel has them; that module imports gRPC, this one may not. A test compares.
PAGE_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 256 << 20

_MANIFEST = "manifest"


def manifest_digest(blob: bytes) -> bytes:
    """The digest that names the content: BLAKE3 of the serialised manifest."""
    return digest_of(blob)


def pages(blob: bytes) -> Iterator[manifest_pb2.ManifestPage]:
    """The pages of a serialised manifest, in order. Raises BadImage when it is too large for any reader."""
    if not 0 < len(blob) <= MANIFEST_BYTES_MAX:
        raise BadImage(_MANIFEST, "", f"{len(blob)} bytes; 1 to {MANIFEST_BYTES_MAX} are possible")
    count = -(-len(blob) // PAGE_BYTES_MAX)
    for index in range(count):
        data = blob[index * PAGE_BYTES_MAX : (index + 1) * PAGE_BYTES_MAX]
        yield manifest_pb2.ManifestPage(index=index, count=count, data=data)


class PageJoiner:
    """Pages as they arrive. Refuses at the first that is out of place: no memory goes to the rest."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, page: manifest_pb2.ManifestPage) -> None:
        """Takes the next page. Raises BadImage."""
        due = len(self._parts)
        if due == 0:
            self._count = page.count
        if page.count != self._count or not 0 < page.count <= MANIFEST_BYTES_MAX // PAGE_BYTES_MAX:
            raise BadImage(_MANIFEST, "", f"page {page.index} says there are {page.count} pages")
        if page.index != due or due >= self._count:
            raise BadImage(_MANIFEST, "", f"page {page.index} came where {due} of {self._count} was due")
        if not 0 < len(page.data) <= PAGE_BYTES_MAX:
            raise BadImage(_MANIFEST, "", f"page {page.index} has {len(page.data)} bytes")
        self._parts.append(page.data)

    def blob(self, digest: bytes) -> bytes:
        """The serialised manifest, which must be the one of `digest`. Raises BadImage."""
        if not self._parts or len(self._parts) < self._count:
            raise BadImage(_MANIFEST, "", f"{len(self._parts)} of {self._count} pages came")
        blob = b"".join(self._parts)
        if manifest_digest(blob) != digest:
            raise BadImage(_MANIFEST, "", f"its digest is {manifest_digest(blob).hex()}, not {digest.hex()}")
        return blob


def join_pages(arrived: Iterable[manifest_pb2.ManifestPage], digest: bytes) -> bytes:
    """The serialised manifest from all its pages. Raises BadImage."""
    joiner = PageJoiner()
    for page in arrived:
        joiner.add(page)
    return joiner.blob(digest)
