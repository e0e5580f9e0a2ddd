"""TLS between agents: the same files as towards the coordinator, in both directions.

    HOTWEIGHTS_CERT, HOTWEIGHTS_KEY --> shown to readers, and to sources
    HOTWEIGHTS_CA                   --> who is believed: as a source by its name too, as a reader by its signature

Files that change are in force from the next connection on; ones that are no good leave the old in force.
"""

import ssl
from pathlib import Path

from hotweights.transports.line import Tls
from hotweights.wire.certificates import BadCertificate, Watched, load_chain, read_pair, trust
from hotweights.worker_client.config import Config


def peer_tls(config: Config) -> Tls | None:
    """None without a certificate. Raises BadCertificate for files that are no good at the start."""
    cert, key, ca = config.cert, config.key, config.ca
    if cert is None or key is None:
        return None
    files = [file for file in (cert, key, ca) if file is not None]

    def make() -> tuple[ssl.SSLContext, ssl.SSLContext]:
        # Once for both: the two contexts are always of the same certificate.
        read_pair(cert, key, server=True, client=True)
        return _server(cert, key, ca), _client(cert, key, ca)

    watched = Watched(f"the data port's certificate {cert}", files, make)
    return Tls(server=lambda: watched.current()[0], client=lambda: watched.current()[1])


def _server(cert: Path, key: Path, ca: Path | None) -> ssl.SSLContext:
    """With an authority of ours only its holders may read. Without, everybody may come; the token decides."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, cert, key)
    context.num_tickets = 0  # connections are few and long: resuming one is worth nothing
    if ca is not None:
        trust(context, ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client(cert: Path, key: Path, ca: Path | None) -> ssl.SSLContext:
    """Without an authority of ours, the system's."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key)
    if ca is not None:
        trust(context, ca)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _context(protocol: int, cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        load_chain(context, cert, key)
    except ssl.SSLError as error:  # changed since it was tried out
        raise BadCertificate(f"{cert}, {key}: {error.reason}") from error
    return context
