"""Transports by name. Nothing is chosen silently: a name that is not there is an error that says what is."""

from collections.abc import Callable

from hotweights.transports.base import Transport
from hotweights.transports.errors import TransportMissing
from hotweights.transports.line import Tls
from hotweights.transports.pace import Pace

KNOWN = ("memory", "tcp")
# Named in the design, so that asking for one is told apart from a typing error.
PLANNED = ("cuda_ipc", "mpi", "ucx")


def open_transport(
    name: str,
    tls: Tls | None = None,
    warn: Callable[[str, str], None] | None = None,
    pace: Pace | None = None,
) -> Transport:
    """The transport of that name. Imports only that one. Raises TransportMissing.

    `tls` is for transports that cross a network: with it they speak TLS, and nothing else. So is `warn`: it hears of
    everything that strangers do to a server, as a host and a text, and decides what is logged; None logs it all.
    `pace` limits what its servers send.
    """
    if name == "memory":
        from hotweights.transports.memory import MemoryTransport

        return MemoryTransport()
    if name == "tcp":
        from hotweights.transports.tcp import TcpTransport
        from hotweights.transports.tcp_server import log_all

        return TcpTransport(tls=tls, warn=warn or log_all, pace=pace)
    reason = "is not in this version" if name in PLANNED else ""
    raise TransportMissing(name, known=KNOWN, reason=reason)
