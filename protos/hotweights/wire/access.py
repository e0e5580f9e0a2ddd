"""How a client shows who it is: certificates for TLS and a token, read anew whenever a channel is opened.

    Config, --ca --cert --key --token-file --> Access --read()--> Shown --> open_channel(endpoint, access)

The token goes only to the coordinator, and beyond this machine only over TLS.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from hotweights.wire.certificates import BadCertificate, read_ca, read_file, read_pair
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused

AUTHORIZATION = "authorization"
TOKEN_CHARACTERS_MAX = 4096
_SCHEME = "Bearer "

Metadata = tuple[tuple[str, str], ...]


class BadAccess(Refused):
    """What the client is to show cannot be shown: a file, or a token over plaintext. It never left this process."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.FAILED_PRECONDITION, "BAD_ACCESS", message)


@dataclass(frozen=True)
class Shown:
    """What goes into a channel. `ca` None means the roots that gRPC brings."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = field(repr=False)
    token: str = field(repr=False)

    @property
    def metadata(self) -> Metadata:
        """What every call carries."""
        return bearer(self.token)


@dataclass(frozen=True)
class Access:
    """Names of files, absolute. `token` is the token itself, used without `token_file`; it is never printed."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token: str = field(default="", repr=False)
    insecure_token: bool = False

    def read(self, endpoint: Endpoint) -> Shown:
        """What the files hold now. Raises BadAccess."""
        token = self.read_token()
        if token and not (endpoint.tls or endpoint.is_loopback or self.insecure_token):
            raise BadAccess(
                f"the token is not sent in plaintext to {endpoint}: write grpcs://{endpoint.target}, or set "
                "HOTWEIGHTS_INSECURE_TOKEN=1 on a network you trust"
            )
        if not endpoint.tls:
            return Shown(None, None, None, token)
        try:
            ca = read_ca(self.ca) if self.ca else None
            pair = read_pair(self.cert, self.key, client=True) if self.cert and self.key else None
        except BadCertificate as error:
            raise BadAccess(str(error)) from error
        return Shown(ca, pair.cert if pair else None, pair.key if pair else None, token)

    def read_token(self) -> str:
        """The token, empty where there is none. Raises BadAccess."""
        if self.token_file is None:
            return _checked(self.token, "HOTWEIGHTS_TOKEN")
        try:
            content = read_file(self.token_file)
        except BadCertificate as error:
            raise BadAccess(str(error)) from error
        token = _checked(content.decode("ascii", "replace").strip(), str(self.token_file))
        if not token:
            raise BadAccess(f"{self.token_file} is empty; it is to hold a token")
        return token


ANONYMOUS = Access()


def bearer(token: str) -> Metadata:
    """The metadata that shows a token; none for the empty one."""
    return ((AUTHORIZATION, f"{_SCHEME}{token}"),) if token else ()


def bearer_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token that a call's metadata shows; empty where it shows none."""
    for name, value in metadata:
        if name == AUTHORIZATION and isinstance(value, str) and value.startswith(_SCHEME):
            return value.removeprefix(_SCHEME)
    return ""


def _checked(token: str, where: str) -> str:
    """The message says nothing of what the token is."""
    if len(token) > TOKEN_CHARACTERS_MAX or not all("!" <= character <= "~" for character in token):
        raise BadAccess(f"{where}: a token is one word of printable ASCII, at most {TOKEN_CHARACTERS_MAX} characters")
    return token
