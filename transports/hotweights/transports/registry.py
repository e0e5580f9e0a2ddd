"""Transports by name, and the choice between them. Nothing is chosen silently: a connection says why it is what it is.

auto: ucx   where the machine has a device for RDMA, ucxx is installed and uses it, and nothing asks for TLS
      tcp   else; and with sources that have no UCX

Before either, what lies in a folder that both nodes share is read there. mpi is never chosen: it is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hotweights.transports.base import Transport
from hotweights.transports.errors import TransportMissing
from hotweights.transports.line import Tls
from hotweights.transports.pace import Pace

if TYPE_CHECKING:
    from hotweights.transports.tcp import TcpTransport

KNOWN = ("memory", "tcp", "ucx", "mpi")
# Not between nodes: whoever asks for it here is told where it is.
WITHIN_A_NODE = {"cuda_ipc": "is for processes of one node, see HOTWEIGHTS_USE_IPC_AGENT"}
# What a node may be told to use between nodes.
CHOICES = ("auto", "tcp", "ucx", "mpi")
Hears = Callable[[str, str], None]


def open_transport(
    name: str,
    tls: Tls | None = None,
    warn: Hears | None = None,
    pace: Pace | None = None,
    *,
    ucx: Mapping[str, str] | None = None,
    shared: Sequence[Path] = (),
) -> Transport:
    """The transport of that name. Imports only that one. Raises TransportMissing.

    `tls` is for tcp: with it everything is over TLS, and nothing in plaintext. `warn` hears of everything that
    strangers do to a server, as a host and a text, and decides what is logged; None logs it all. `pace` limits what its
    servers send. `ucx` are settings of UCX by its own names, without UCX_. What sources have below the folders `shared`
    is read in place. That of mpi waits for the other ranks of its job: not on an event loop.
    """
    if name == "memory":
        from hotweights.transports.memory import MemoryTransport

        return MemoryTransport()
    if name == "tcp":
        return _sharing(_tcp(tls, warn, pace, ""), shared)
    if name == "ucx":
        return _sharing(_ucx(warn, pace, ucx or {}, fall_back=False), shared)
    if name == "mpi":
        return _sharing(_mpi(warn, pace), shared)
    raise TransportMissing(name, known=KNOWN, reason=WITHIN_A_NODE.get(name, ""))


def choose_transport(
    tls: Tls | None = None,
    warn: Hears | None = None,
    pace: Pace | None = None,
    *,
    ucx: Mapping[str, str] | None = None,
    shared: Sequence[Path] = (),
) -> Transport:
    """What `auto` means here; see above. The arguments are those of open_transport."""
    return _sharing(_choose(tls, warn, pace, ucx or {}), shared)


def _choose(tls: Tls | None, warn: Hears | None, pace: Pace | None, ucx: Mapping[str, str]) -> "TcpTransport":
    from hotweights.transports.ucx_lane import has_rdma, open_lane

    if tls is not None:
        return _tcp(tls, warn, pace, "")
    if not has_rdma():
        return _tcp(None, warn, pace, "no device for RDMA")
    try:
        lane = open_lane(ucx)
    except TransportMissing as missing:
        return _tcp(None, warn, pace, missing.reason)
    if not lane.finds_rdma():
        return _tcp(None, warn, pace, "UCX uses no device for RDMA")
    return _ucx(warn, pace, ucx, fall_back=True)


def _sharing(transport: "TcpTransport", roots: Sequence[Path]) -> Transport:
    if not roots:
        return transport
    from hotweights.transports.shared import SharedTransport

    return SharedTransport(transport, roots)


def _tcp(tls: Tls | None, warn: Hears | None, pace: Pace | None, why: str) -> "TcpTransport":
    from hotweights.transports.tcp import TcpTransport
    from hotweights.transports.tcp_server import log_all

    return TcpTransport(tls=tls, warn=warn or log_all, pace=pace, why=why)


def _ucx(warn: Hears | None, pace: Pace | None, settings: Mapping[str, str], *, fall_back: bool) -> "TcpTransport":
    from hotweights.transports.tcp_server import log_all
    from hotweights.transports.ucx import UcxTransport
    from hotweights.transports.ucx_lane import open_lane

    return UcxTransport(open_lane(settings), warn=warn or log_all, pace=pace, fall_back=fall_back)


def _mpi(warn: Hears | None, pace: Pace | None) -> "TcpTransport":
    from hotweights.transports.mpi import MpiTransport
    from hotweights.transports.mpi_lane import open_lane
    from hotweights.transports.tcp_server import log_all

    return MpiTransport(open_lane(), warn=warn or log_all, pace=pace)
