"""Transports by name, and what importing them loads."""

import importlib.util
import subprocess
import sys

import pytest

from hotweights.transports import ucx_lane
from hotweights.transports.errors import TransportMissing
from hotweights.transports.registry import KNOWN, choose_transport, open_transport
from hotweights.transports.tcp import TcpTransport


@pytest.mark.asyncio(loop_scope="session")  # that of the other tests of ucx, which has one for good
@pytest.mark.parametrize("name", [name for name in KNOWN if name != "mpi"])  # test_mpi.py opens it, in jobs of its own
async def test_a_transport_is_found_by_its_name(name: str) -> None:
    if name == "ucx" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed: it has wheels for Linux and Python 3.11 only")
    assert open_transport(name).name == name


class FakeLane:
    address = b"address"

    def __init__(self, *, rdma: bool) -> None:
        self.finds_rdma = lambda: rdma


@pytest.mark.parametrize(
    ("device", "lane", "name", "way"),
    [
        (False, None, "tcp", "tcp (no device for RDMA)"),
        (True, None, "tcp", "tcp (needs ucxx, which is not installed)"),
        (True, FakeLane(rdma=False), "tcp", "tcp (UCX uses no device for RDMA)"),
        (True, FakeLane(rdma=True), "ucx", "ucx"),
    ],
)
def test_auto_takes_ucx_where_it_has_rdma_and_says_why_not(
    monkeypatch: pytest.MonkeyPatch, device: bool, lane: FakeLane | None, name: str, way: str
) -> None:
    def open_lane(settings: object) -> FakeLane:
        if lane is None:
            raise TransportMissing("ucx", "ucx", reason="needs ucxx, which is not installed")
        return lane

    monkeypatch.setattr(ucx_lane, "has_rdma", lambda: device)
    monkeypatch.setattr(ucx_lane, "open_lane", open_lane)
    chosen = choose_transport()
    assert isinstance(chosen, TcpTransport)
    assert (chosen.name, chosen._way) == (name, way)


def test_an_unknown_transport_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(TransportMissing, match="'tpc' is unknown; there are: memory, tcp, ucx") as caught:
        open_transport("tpc")
    assert (caught.value.name, caught.value.known) == ("tpc", KNOWN)


def test_a_missing_extra_is_named() -> None:
    assert str(TransportMissing("ucx", "ucx", reason="needs ucxx")) == (
        "transport 'ucx' needs ucxx; install hotweights[ucx]"
    )


def test_transports_load_neither_the_protocol_nor_grpc() -> None:
    code = (
        "import sys, hotweights.transports.tcp, hotweights.transports.memory, hotweights.transports.registry;"
        "print([m for m in sys.modules if m.split('.')[0] in ('grpc', 'google', 'torch', 'numpy')"
        " or m.startswith(('hotweights.v1', 'hotweights.wire'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
