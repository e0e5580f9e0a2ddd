"""Certificates as files: read whole, tried out before they are used, and made anew when the files change.

    files --Watched.current()--> changed? --no--> what was made of them before
                                    | yes
                                    +--make()--> good: from now on this one; bad: logged, the old one serves on

Both ends use this: the coordinator, the agent's data port, and every client.
"""

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Certificates are a few KiB; a file named by mistake must not be read into memory whole.
FILE_BYTES_MAX = 4 << 20
# So often files are tried again that changed and are no good: whoever replaces them is about to go on.
TRY_AGAIN_S = 1.0
_HANDSHAKE_TURNS_MAX = 16

_REASONS = {
    "KEY_VALUES_MISMATCH": "the key is not that of the certificate",
    "EE_KEY_TOO_SMALL": "its key is too short",
    "CA_MD_TOO_WEAK": "its signature is too weak",
    "NO_CERTIFICATE_OR_CRL_FOUND": "holds no certificate in PEM form",
}


class BadCertificate(ValueError):
    """Files that cannot be used as they are; the message names one and says what is wrong."""


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key as PEM, known to fit. `ends_at_s` is in Unix seconds."""

    cert: bytes
    key: bytes = field(repr=False)
    ends_at_s: float


def read_pair(cert: Path, key: Path, *, server: bool = False, client: bool = False) -> Pair:
    """The pair if it can be used in that role today. Raises BadCertificate."""
    chain, secret = read_file(cert), read_file(key)
    _trusting(cert)
    try:
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    except ssl.SSLError as error:
        raise BadCertificate(f"{cert}, {key}: {_said(error)}") from error
    ends_at_s = 0.0
    if server:
        ends_at_s = _try_out(cert, key, as_server=True)
    if client:
        ends_at_s = _try_out(cert, key, as_server=False)
    return Pair(chain, secret, ends_at_s)


def read_ca(ca: Path) -> bytes:
    """PEM of the authorities whose certificates are to be trusted. Raises BadCertificate."""
    content = read_file(ca)
    found = _trusting(ca).get_ca_certs()
    if not found:
        raise BadCertificate(f"{ca} holds a certificate, but none of an authority (CA:TRUE)")
    if all(_ends_at_s(authority) < time.time() for authority in found):
        raise BadCertificate(f"{ca}: every authority in it has expired")
    return content


def trust(context: ssl.SSLContext, ca: Path) -> None:
    """Who has a certificate of the authorities in the file is believed from now on. Raises BadCertificate."""
    read_ca(ca)
    _load_authorities(context, ca)


def read_file(path: Path) -> bytes:
    """Raises BadCertificate."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadCertificate(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise BadCertificate(f"{path} has more than {FILE_BYTES_MAX} bytes, so it is no certificate, key or token")
    return content


def load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Raises BadCertificate where a file cannot be read, SSLError where the two are no pair."""
    is_locked = False

    def no_password() -> bytes:
        nonlocal is_locked
        is_locked = True
        return b""

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if is_locked:
            raise BadCertificate(f"{key} is encrypted; a service needs it without a password") from error
        if error.reason in _REASONS:
            raise
        raise BadCertificate(f"{key} holds no private key in PEM form that can be used") from error
    except OSError as error:  # gone since it was read: somebody renews without a rename
        raise BadCertificate(f"{cert}, {key} cannot be read: {error.strerror}") from error


def moment(at_s: float) -> str:
    """A time of a certificate for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at_s))


class Watched(Generic[T]):
    """What `make` makes of files, and makes anew when they change. Any thread may ask."""

    def __init__(self, what: str, files: Sequence[Path], make: Callable[[], T]) -> None:
        """`make` raises BadCertificate for files that are no good; so does this."""
        self._what = what
        self._files = tuple(files)
        self._make = make
        self._turn = threading.Lock()
        self._stamps = self._look()
        self._made = make()
        self._next_try_s = 0.0
        self._problem = ""

    def current(self) -> T:
        """Never raises for what is wrong with the files: the last good ones stay in force."""
        with self._turn:
            stamps = self._look()
            if stamps != self._stamps and time.monotonic() >= self._next_try_s:
                self._renew(stamps)
            return self._made

    def _renew(self, stamps: object) -> None:
        try:
            made = self._make()
        except BadCertificate as error:
            self._next_try_s = time.monotonic() + TRY_AGAIN_S
            if self._problem != str(error):
                self._problem = str(error)
                log.error("%s: the files changed and are no good, the old ones serve on: %s", self._what, error)
            return
        if stamps != self._look():  # somebody writes at this moment: what was made may be of two halves
            return
        self._made, self._stamps, self._problem = made, stamps, ""
        log.info("%s: the files changed and are in force", self._what)

    def _look(self) -> tuple[object, ...]:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Follows links: Kubernetes changes a secret by changing where a link points."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _trusting(file: Path) -> ssl.SSLContext:
    """A client that trusts what is in the file, authority or not. Raises BadCertificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_authorities(context, file)
    return context


def _load_authorities(context: ssl.SSLContext, file: Path) -> None:
    """By its name, not by its content: as a text ssl takes ASCII only, and bundles have comments."""
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise BadCertificate(f"{file}: {_said(error)}") from error
    except OSError as error:  # gone since it was read
        raise BadCertificate(f"{file} cannot be read: {error.strerror}") from error


def _try_out(cert: Path, key: Path, *, as_server: bool) -> float:
    """A handshake in memory with who trusts just this certificate: it fails exactly where a real one would.

    Returns when the certificate ends. Raises BadCertificate.
    """
    shows, looks = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), _trusting(cert)
    load_chain(shows, cert, key)
    if not as_server:
        # The same with the roles of who is looked at changed; the server's own certificate is of no interest.
        shows.verify_mode = ssl.CERT_REQUIRED
        shows.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _load_authorities(shows, cert)
        looks.verify_mode = ssl.CERT_NONE
        load_chain(looks, cert, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = shows.wrap_bio(to_server, to_client, server_side=True)
    client = looks.wrap_bio(to_client, to_server)
    try:
        for _ in range(_HANDSHAKE_TURNS_MAX):
            if not [side for side in (client, server) if not _has_shaken(side)]:
                break
        known = client.getpeercert() if as_server else server.getpeercert()
    except ssl.SSLCertVerificationError as error:
        raise BadCertificate(f"{cert}: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise BadCertificate(f"{cert}: {_said(error)}") from error
    if known is None:
        raise BadCertificate(f"{cert} does not come to a handshake with itself")
    return _ends_at_s(known)


def _has_shaken(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _ends_at_s(certificate: "ssl._PeerCertRetDictType") -> float:
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def _said(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    return _REASONS.get(reason) or reason.replace("_", " ").lower() or "is no certificate in PEM form"
