"""The coordinator's certificates as gRPC takes them; changed files are in force from the next handshake on.

    client --ClientHello--> gRPC --fetch()--> Watched: nothing changed, or what the files hold now

Streams that are open live on over what they began with. That the fetcher works under grpc.aio was tried: it is
called in a thread of gRPC's own, with the interpreter's lock held, before every handshake.
"""

import logging
from pathlib import Path

import grpc

from hotweights.coordinator.config import Config
from hotweights.wire.certificates import Watched, moment, read_ca, read_pair

log = logging.getLogger(__name__)


def server_credentials(config: Config) -> grpc.ServerCredentials:
    """Credentials that follow the files. Raises BadCertificate for files that are no good at the start."""
    cert, key, ca = config.tls_cert, config.tls_key, config.client_ca
    assert cert is not None, "checked: TLS is asked for"
    assert key is not None, "checked: they come together"
    files = [file for file in (cert, key, ca) if file is not None]
    watched = Watched(f"certificate {cert}", files, lambda: _read(cert, key, ca))
    told = watched.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """None is gRPC's word for no change; anything else makes it build its TLS context anew."""
        nonlocal told
        now = watched.current()
        if now is told:
            return None
        told = now
        return now

    # The stubs know of no None, which grpc's own documentation names.
    return grpc.dynamic_ssl_server_credentials(told, fetch, ca is not None)  # type: ignore[arg-type]


def _read(cert: Path, key: Path, ca: Path | None) -> grpc.ServerCertificateConfiguration:
    pair = read_pair(cert, key, server=True)
    roots = read_ca(ca) if ca is not None else None
    log.info("certificate %s is valid until %s", cert, moment(pair.ends_at_s))
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.cert)], roots)
