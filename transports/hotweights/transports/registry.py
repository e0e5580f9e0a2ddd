"""Transports by name. Nothing is chosen silently: a name that is not there is an error that says what is."""

from hotweights.transports.base import Transport
from hotweights.transports.errors import TransportMissing

KNOWN = ("memory", "tcp")
# Named in the design, so that asking for one is told apart from a typing error.
PLANNED = ("cuda_ipc", "mpi", "ucx")


def open_transport(name: str) -> Transport:
    """The transport of that name. Imports only that one. Raises TransportMissing."""
    if name == "memory":
        from hotweights.transports.memory import MemoryTransport

        return MemoryTransport()
    if name == "tcp":
        from hotweights.transports.tcp import TcpTransport

        return TcpTransport()
    reason = "is not in this version" if name in PLANNED else ""
    raise TransportMissing(name, known=KNOWN, reason=reason)
