"""Certificates of an authority that lives as long as a test, as files."""

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from hotweights.transports.line import Tls

HERE = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Files:
    """A certificate and its key. `options` name them, and the authority, as a client's command line does."""

    ca: Path
    cert: Path
    key: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"HOTWEIGHTS_CA": str(self.ca), "HOTWEIGHTS_CERT": str(self.cert), "HOTWEIGHTS_KEY": str(self.key)}

    @property
    def options(self) -> tuple[str, ...]:
        return ("--ca", str(self.ca), "--cert", str(self.cert), "--key", str(self.key))

    def become(self, other: "Files") -> None:
        """The other's certificate under these names, as a renewal puts it there."""
        for mine, theirs in ((self.cert, other.cert), (self.key, other.key)):
            fresh = mine.with_name(f"{mine.name}.new")
            fresh.write_bytes(theirs.read_bytes())
            fresh.replace(mine)


class Authority:
    """Signs what a test needs, into `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._authority.cert_pem.bytes())

    def issue(self, name: str, *hosts: str, begins: int = 2000, ends: int = 3000) -> Files:
        """For this machine unless `hosts` are given; good from the year `begins` until the year `ends`."""
        issued = self._authority.issue_cert(
            *(hosts or HERE),
            not_before=datetime.datetime(begins, 1, 1, tzinfo=datetime.timezone.utc),
            not_after=datetime.datetime(ends, 1, 1, tzinfo=datetime.timezone.utc),
            key_type=trustme.KeyType.ECDSA,
        )
        files = Files(self.file, self._folder / f"{name}.pem", self._folder / f"{name}.key")
        files.cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files


def contexts(server: Files | None, client: Files | None, *, trusts: Path) -> Tls:
    """What the tcp transport takes; a side without files shows no certificate."""
    serves, reads = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, files in ((serves, server), (reads, client)):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cafile=trusts)
        if files is not None:
            context.load_cert_chain(files.cert, files.key)
    serves.verify_mode = ssl.CERT_REQUIRED
    return Tls(lambda: serves, lambda: reads)
