"""Endpoints as people write them, and the target and bind address that gRPC wants.

tcp://host:port   grpc://host:port   host:port   [::1]:port   unix:/path   unix:///path      plaintext
grpcs://host:port                                                                             TLS
"""

import ipaddress
import re
from dataclasses import dataclass

FORMS = "tcp://HOST:PORT, grpc://HOST:PORT, grpcs://HOST:PORT, HOST:PORT or unix:PATH"


class BadEndpoint(ValueError):
    """The text is no endpoint. The message says what one looks like."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(f"endpoint {text!r}: {why}; write {FORMS}")
        self.text = text


@dataclass(frozen=True)
class Endpoint:
    """Either a TCP address (`host`, `port`, with or without `tls`) or a unix socket (`path`)."""

    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    @property
    def target(self) -> str:
        """What grpc.aio takes as channel target and as bind address."""
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. A name other than localhost counts as not."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path:
            return self.target
        return f"{'grpcs' if self.tls else 'tcp'}://{self.target}"


def parse_endpoint(text: str) -> Endpoint:
    """Reads an endpoint. Port 0 is allowed (a server picks one). Raises BadEndpoint."""
    rest = text.strip()
    if rest.startswith("unix:"):
        path = rest.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or path.startswith("//"):
            raise BadEndpoint(text, "the socket's path is missing")
        return Endpoint(path=path)
    scheme, separator, after = rest.partition("://")
    if separator:
        if scheme not in ("tcp", "grpc", "grpcs"):
            raise BadEndpoint(text, f"unknown scheme {scheme!r}")
        rest = after
    host, separator, port = rest.rstrip("/").rpartition(":")
    if not separator:
        raise BadEndpoint(text, "the port is missing")
    if not host:
        raise BadEndpoint(text, "the host is missing")
    if host.startswith("[") != host.endswith("]") or (":" in host and host[0] != "["):
        raise BadEndpoint(text, "an IPv6 address goes in brackets")
    # Brackets only around, and something inside them.
    if not re.fullmatch(r"\[[^][/\s]+\]|[^][/\s]+", host) or not host.isprintable():
        raise BadEndpoint(text, f"{host!r} is no host")
    # The length first: int() raises for thousands of digits.
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise BadEndpoint(text, f"{port!r} is not a port")
    return Endpoint(host=host.strip("[]"), port=int(port), tls=bool(after) and scheme == "grpcs")
