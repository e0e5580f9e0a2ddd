"""CUDA's interprocess memory where there is no CUDA; tests/gpu has the rest."""

import ctypes.util

import pytest

from hotweights.transports import cuda_ipc
from hotweights.transports.cuda_ipc import Borrowed, CudaError, Lent, NoCuda
from hotweights.transports.errors import TransportError, TransportMissing
from hotweights.transports.registry import open_transport

no_driver = pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a CUDA driver here")


@no_driver
def test_without_a_driver_it_says_so() -> None:
    for use in (cuda_ipc.devices, lambda: Lent(0, 1), lambda: Borrowed(0, bytes(64)), lambda: cuda_ipc.pin(0, 0, 1)):
        with pytest.raises(NoCuda, match="there is no CUDA driver here"):
            use()


def test_what_is_no_handle_is_refused_before_any_driver_is_asked() -> None:
    with pytest.raises(CudaError, match="a handle has 64 bytes, not 5"):
        Borrowed(0, b"short")


def test_a_cuda_array_is_where_and_as_large_as_it_says() -> None:
    assert cuda_ipc.DeviceArray(4096, 10).__cuda_array_interface__ == {
        "shape": (10,),
        "typestr": "|u1",
        "data": (4096, False),
        "version": 2,
    }


def test_it_carries_nothing_between_nodes_and_says_what_it_is_for() -> None:
    with pytest.raises(TransportMissing, match="'cuda_ipc' is for processes of one node, see HOTWEIGHTS_USE_IPC_AGENT"):
        open_transport("cuda_ipc")
    assert issubclass(CudaError, TransportError)
    assert issubclass(NoCuda, TransportError)
