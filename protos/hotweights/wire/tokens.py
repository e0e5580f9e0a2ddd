"""Transfer tokens: what lets one node read one image from another, until a given time.

    coordinator --make_token(the source's key)--> reader --first frame--> source --check_token--> reader's id

The source draws its key anew in each life and tells it the coordinator in Hello. Sources check
without asking anyone; readers can neither make a token nor widen one. Layout, numbers big endian:

    version 1 B | expiry, Unix seconds 8 B | length of the reader's id 2 B | the id, UTF-8 | HMAC-SHA256 32 B

The HMAC is over all that stands before it, then the image's digest (32 B), then the source's id:
those two the source knows, so they need not travel.
"""

import hmac
import struct

KEY_BYTES = 32
DIGEST_BYTES = 32
TOKEN_BYTES_MAX = 512

_VERSION = 1
_HEAD = struct.Struct("!BQH")
_MAC_BYTES = 32
_READER_BYTES_MAX = TOKEN_BYTES_MAX - _HEAD.size - _MAC_BYTES


class BadToken(ValueError):
    """The token does not allow the transfer. `expired` tells one that did from one that never has."""

    def __init__(self, problem: str, *, expired: bool = False) -> None:
        super().__init__(f"transfer token {problem}")
        self.problem = problem
        self.expired = expired


def make_token(key: bytes, image: bytes, reader: str, source: str, expires_at_s: float) -> bytes:
    """A token for node `reader` to read the image of digest `image` from node `source`.

    `key` is the source's, 32 bytes; `expires_at_s` is in Unix seconds. Raises ValueError for a key,
    digest or id of impossible length.
    """
    name = reader.encode()
    if not 0 < len(name) <= _READER_BYTES_MAX:
        raise ValueError(f"a reader's id takes 1 to {_READER_BYTES_MAX} bytes, this one {len(name)}")
    head = _HEAD.pack(_VERSION, int(expires_at_s), len(name)) + name
    return head + _mac(key, head, image, source)


def check_token(key: bytes, token: bytes, image: bytes, source: str, now_s: float) -> str:
    """The id of the node that may read. Raises BadToken."""
    if len(token) > TOKEN_BYTES_MAX or len(token) < _HEAD.size + _MAC_BYTES:
        raise BadToken("is malformed")
    head, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
    # The seal first: nothing in a token is looked at before it is known to be the coordinator's.
    if len(image) != DIGEST_BYTES or not hmac.compare_digest(mac, _mac(key, head, image, source)):
        raise BadToken("is not for this image and source, or not from this cluster's coordinator")
    version, expires_at_s, length = _HEAD.unpack_from(head)
    if version != _VERSION or not length or len(head) != _HEAD.size + length:
        raise BadToken("is of another layout")
    if now_s >= expires_at_s:
        raise BadToken(f"expired {now_s - expires_at_s:.0f} s ago", expired=True)
    try:
        return head[_HEAD.size :].decode()
    except UnicodeDecodeError:
        raise BadToken("names no reader") from None


def _mac(key: bytes, head: bytes, image: bytes, source: str) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a token key has {KEY_BYTES} bytes, this one {len(key)}")
    if len(image) != DIGEST_BYTES:
        raise ValueError(f"an image's digest has {DIGEST_BYTES} bytes, this one {len(image)}")
    return hmac.digest(key, head + image + source.encode(), "sha256")
