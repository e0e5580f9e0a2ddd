"""Transports by name, and what importing them loads."""

import subprocess
import sys

import pytest

from hotweights.transports.errors import TransportMissing
from hotweights.transports.registry import KNOWN, open_transport


@pytest.mark.parametrize("name", KNOWN)
def test_a_transport_is_found_by_its_name(name: str) -> None:
    assert open_transport(name).name == name


@pytest.mark.parametrize("name", ["ucx", "cuda_ipc", "mpi"])
def test_a_transport_of_a_later_version_says_that_it_is_not_in_this_one(name: str) -> None:
    with pytest.raises(TransportMissing, match=f"'{name}' is not in this version; there are: memory, tcp"):
        open_transport(name)


def test_an_unknown_transport_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(TransportMissing, match="'tpc' is unknown; there are: memory, tcp") as caught:
        open_transport("tpc")
    assert (caught.value.name, caught.value.known) == ("tpc", ("memory", "tcp"))


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
