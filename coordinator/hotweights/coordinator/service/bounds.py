"""What members say of themselves, bounded: it is kept, logged for good, and shown to whoever asks for status.

Text for people is cut; what would mean something else when cut ends the session.
"""

import re
from collections.abc import Sequence

import grpc

from hotweights.v1 import fleet_pb2
from hotweights.wire.endpoint import BadEndpoint, parse_endpoint
from hotweights.wire.errors import Refused
from hotweights.wire.tokens import DIGEST_BYTES

TEXT_LENGTH_MAX = 2000
ENGINE_LENGTH_MAX = 200
# Incarnations, sessions' and updates' ids, clusters.
ID_LENGTH_MAX = 200
# The longest name of a host has 253.
ENDPOINT_LENGTH_MAX = 300
# A node that has published every ten minutes for two months; its row in a list has 340 kB then.
DIGESTS_MAX = 10_000
RANKS_MAX = 1024
FINGERPRINT_BYTES_MAX = 64
FINGERPRINT_KIND_LENGTH_MAX = 128
ROUTE_REASONS_MAX = 8
ROUTE_REASON_LENGTH_MAX = 300

_TRANSPORT = re.compile(r"[a-z][a-z0-9+._-]*")


def bad_hello(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_HELLO", message)


def text(said: str, length_max: int = TEXT_LENGTH_MAX) -> str:
    """The beginning of it, and how much is left out."""
    more = len(said) - length_max
    return said if more <= 0 else f"{said[:length_max]}... ({more} more characters)"


def checked_id(said: str, what: str) -> str:
    """Raises Refused."""
    if len(said) > ID_LENGTH_MAX:
        raise bad_hello(f"{what} has {len(said)} characters, more than {ID_LENGTH_MAX}")
    return said


def checked_endpoint(said: str) -> str:
    """[TRANSPORT://]HOST:PORT as it was said; empty for a node that serves nothing. Raises Refused."""
    if not said:
        return said
    if len(said) > ENDPOINT_LENGTH_MAX:
        raise bad_hello(f"a data endpoint has {len(said)} characters, more than {ENDPOINT_LENGTH_MAX}")
    transport, separator, address = said.rpartition("://")
    try:
        is_one = not parse_endpoint(address).path and address == address.strip()
    except BadEndpoint:
        is_one = False
    if not is_one or (separator and not _TRANSPORT.fullmatch(transport)):
        raise bad_hello(f"a data endpoint is TRANSPORT://HOST:PORT, not {said!r}")
    return said


def ranks(said: Sequence[fleet_pb2.Rank]) -> tuple[tuple[int, str, int], ...]:
    """Raises Refused."""
    if not 0 < len(said) <= RANKS_MAX:
        raise bad_hello(f"a replica's Hello lists every rank with its node, 1 to {RANKS_MAX}, not {len(said)}")
    return tuple((rank.index, rank.node_id, rank.pid) for rank in said)


def digest(said: bytes) -> str:
    """In hex; empty stands for nothing known. Raises Refused."""
    if len(said) not in (0, DIGEST_BYTES):
        raise _bad_digest(f"a digest has {DIGEST_BYTES} bytes, this one {len(said)}")
    return said.hex()


def digests(said: Sequence[bytes]) -> frozenset[str]:
    """Raises Refused."""
    if len(said) > DIGESTS_MAX:
        raise _bad_digest(f"{len(said)} images at one node, more than {DIGESTS_MAX}")
    return frozenset(digest(item) for item in said) - {""}


def fingerprints(said: Sequence[bytes]) -> tuple[str, ...]:
    """In hex. Raises Refused."""
    if len(said) > RANKS_MAX or any(len(item) > FINGERPRINT_BYTES_MAX for item in said):
        raise _bad_digest(
            f"{len(said)} fingerprints of {sum(map(len, said))} bytes: a replica has one a rank, at most {RANKS_MAX}, "
            f"of up to {FINGERPRINT_BYTES_MAX} bytes each"
        )
    return tuple(item.hex() for item in said)


def fingerprint_kind(said: str) -> str:
    """Cut, two kinds could become one. Raises Refused."""
    if len(said) > FINGERPRINT_KIND_LENGTH_MAX:
        raise bad_hello(f"a fingerprint kind has {len(said)} characters, more than {FINGERPRINT_KIND_LENGTH_MAX}")
    return said


def route_lines(said: Sequence[str]) -> tuple[str, ...]:
    """The first of them."""
    return tuple(text(reason, ROUTE_REASON_LENGTH_MAX) for reason in said[:ROUTE_REASONS_MAX])


def _bad_digest(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_DIGEST", message)
