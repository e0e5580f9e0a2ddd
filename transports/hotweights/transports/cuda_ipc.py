"""GPU memory that one process lends to others on its node: CUDA's interprocess handles, as plain bytes.

    lender:   Lent(ordinal, size) --handle: 64 bytes--+
    borrower:                                         +--> Borrowed(ordinal, handle) --as_array--> torch, CuPy, Numba

Through the driver's library, which is wherever there is a GPU; neither torch nor a CUDA toolkit is needed. Devices are
known by their UUIDs: ordinals differ between processes (CUDA_VISIBLE_DEVICES).

What a borrower has open stays readable when the lender frees it or dies, but nothing says what is in it then: prove
what was copied. A handle of memory that was freed is refused.
"""

import ctypes
import functools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hotweights.transports.errors import TransportError

HANDLE_BYTES = 64
BLOCK_BYTES = 2 << 20
LIBRARY = "libcuda.so.1"
_PEERS_AS_NEEDED = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_FOR_ALL = 1  # CU_MEMHOSTREGISTER_PORTABLE


class CudaError(TransportError):
    """The driver refused. `name` is its word for it, as in CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, doing: str, name: str) -> None:
        super().__init__(f"{doing}: {name}")
        self.doing = doing
        self.name = name


class NoCuda(TransportError):
    """There is no driver or no GPU here."""


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * 16),)


_ADDRESS = ctypes.c_uint64
_OUT = ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDeviceGetUuid_v2": (_OUT, ctypes.c_int),
    "cuDeviceCanAccessPeer": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (_OUT, ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemGetAddressRange_v2": (_OUT, _OUT, _ADDRESS),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, ctypes.c_size_t),
    "cuMemcpyDtoD_v2": (_ADDRESS, _ADDRESS, ctypes.c_size_t),
    "cuMemcpyHtoD_v2": (_ADDRESS, ctypes.c_void_p, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, _ADDRESS, ctypes.c_size_t),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuIpcGetMemHandle": (_OUT, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_OUT, _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
}


class _Driver:
    """The library, with a device's primary context (torch's too) made current for each call."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NoCuda(f"there is no CUDA driver here: {error}") from error
        if code := self._library.cuInit(0):
            raise NoCuda(f"CUDA finds no GPU here: {self._name(code)}")
        try:
            for name, arguments in _ARGUMENTS.items():
                getattr(self._library, name).argtypes = arguments
        except AttributeError as error:
            raise NoCuda(f"the CUDA driver here is too old: {error}") from error
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def call(self, doing: str, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise CudaError(doing, self._name(code))

    @contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        if ordinal not in self._contexts:
            context = ctypes.c_void_p()
            self.call(f"GPU {ordinal}", "cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
            self._contexts[ordinal] = context
        self.call(f"GPU {ordinal}", "cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            self.call(f"GPU {ordinal}", "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or str(code).encode()).decode()


@functools.cache
def _driver() -> _Driver:
    return _Driver()


def devices() -> dict[str, int]:
    """The GPUs that this process sees: UUID, as nvidia-smi writes it, to ordinal. Raises NoCuda, CudaError."""
    driver, count = _driver(), ctypes.c_int()
    driver.call("counting GPUs", "cuDeviceGetCount", ctypes.byref(count))
    return {_uuid(ordinal): ordinal for ordinal in range(count.value)}


def _uuid(ordinal: int) -> str:
    found = _Uuid()
    _driver().call(f"GPU {ordinal}", "cuDeviceGetUuid_v2", ctypes.byref(found), ordinal)
    return f"GPU-{uuid.UUID(bytes=bytes(found.data))}"


def can_reach(ordinal: int, other: int) -> bool:
    """Whether the one GPU can read the other's memory. Raises NoCuda, CudaError."""
    if ordinal == other:
        return True
    found = ctypes.c_int()
    _driver().call(f"GPU {ordinal}", "cuDeviceCanAccessPeer", ctypes.byref(found), ordinal, other)
    return bool(found.value)


def synchronize(ordinal: int) -> None:
    """Waits for everything that runs on a GPU. Raises CudaError, of what failed there before too."""
    driver = _driver()
    with driver.on(ordinal):
        driver.call(f"GPU {ordinal}", "cuCtxSynchronize")


def free_bytes(ordinal: int) -> int:
    """Device memory that nobody has. Raises NoCuda, CudaError."""
    driver, free, total = _driver(), ctypes.c_size_t(), ctypes.c_size_t()
    with driver.on(ordinal):
        driver.call(f"GPU {ordinal}", "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def pin(ordinal: int, address: int, size: int) -> None:
    """Pins memory of the host where it lies, so that GPUs read and write it by themselves. Raises NoCuda, CudaError.

    Not by CUDA's runtime: that takes the GPU that is current, and keeps the error for the next kernel of the thread.
    """
    driver = _driver()
    with driver.on(ordinal):
        driver.call(f"pinning {size} bytes", "cuMemHostRegister_v2", address, size, _FOR_ALL)


def unpin(ordinal: int, address: int) -> None:
    """Before the memory goes. Raises CudaError."""
    driver = _driver()
    with driver.on(ordinal):
        driver.call("unpinning memory", "cuMemHostUnregister", address)


class _Memory:
    """Bytes at an address of a GPU."""

    def __init__(self, ordinal: int, address: int, size: int) -> None:
        self.ordinal = ordinal
        self.address = address
        self.size = size

    def _at(self, offset: int, size: int) -> int:
        """What reads outside ends every use of the GPU in this process."""
        if not self.address or offset < 0 or size < 0 or offset + size > self.size:
            raise CudaError(f"{size} bytes from {offset} on", f"there are {self.size} bytes of GPU memory")
        return self.address + offset

    def read(self, offset: int, size: int) -> bytes:
        """To the host. Raises CudaError."""
        driver, found, at = _driver(), ctypes.create_string_buffer(size), self._at(offset, size)
        with driver.on(self.ordinal):
            driver.call("reading GPU memory", "cuMemcpyDtoH_v2", found, at, size)
        return found.raw

    def as_array(self, offset: int, size: int) -> "DeviceArray":
        """Bytes of it, for torch.as_tensor and whatever else takes a CUDA array, until it is closed.

        Raises CudaError for what lies outside.
        """
        return DeviceArray(self._at(offset, size), size)


class Lent(_Memory):
    """New memory on a GPU, to be lent. Raises NoCuda, CudaError (also where there is not as much)."""

    def __init__(self, ordinal: int, size: int) -> None:
        # A handle is of a whole block of the driver's: what is smaller would lend its neighbours too.
        taken = -(-max(size, 1) // BLOCK_BYTES) * BLOCK_BYTES
        driver, address, handle = _driver(), _ADDRESS(), _Handle()
        with driver.on(ordinal):
            driver.call(f"taking {taken} bytes of GPU memory", "cuMemAlloc_v2", ctypes.byref(address), taken)
            super().__init__(ordinal, address.value, taken)
            try:
                # What this process freed lately may lie there.
                driver.call("clearing GPU memory", "cuMemsetD8_v2", address, 0, taken)
                driver.call("lending GPU memory", "cuIpcGetMemHandle", ctypes.byref(handle), address)
            except CudaError:
                self.close()
                raise
        self.handle = bytes(handle.data)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """From the host; a memoryview is of writable, contiguous bytes. Raises CudaError."""
        driver, at, size = _driver(), self._at(offset, len(data)), len(data)
        source = data if isinstance(data, bytes) else (ctypes.c_ubyte * size).from_buffer(data)
        with driver.on(self.ordinal):
            driver.call("writing GPU memory", "cuMemcpyHtoD_v2", at, source, size)

    def copy(self, offset: int, source: int, size: int) -> None:
        """From an address of the same GPU; done when `synchronize` returns. Raises CudaError."""
        driver, at = _driver(), self._at(offset, size)
        with driver.on(self.ordinal):
            driver.call("copying GPU memory", "cuMemcpyDtoD_v2", at, source, size)

    def close(self) -> None:
        """Frees it: its handle opens nothing any more. Again does nothing."""
        address, self.address = self.address, 0
        if address:
            driver = _driver()
            with driver.on(self.ordinal):
                driver.call("freeing GPU memory", "cuMemFree_v2", address)


class Borrowed(_Memory):
    """Memory of another process, by its handle, opened for the GPU `ordinal` of this one.

    Raises NoCuda, CudaError: the handle is none, what it was of was freed, or it lies on a GPU that is out of reach.
    """

    def __init__(self, ordinal: int, handle: bytes) -> None:
        if len(handle) != HANDLE_BYTES:
            raise CudaError("borrowing GPU memory", f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        driver, address = _driver(), _ADDRESS()
        named = _Handle.from_buffer_copy(handle)
        with driver.on(ordinal):
            doing = "borrowing GPU memory"
            driver.call(doing, "cuIpcOpenMemHandle_v2", ctypes.byref(address), named, _PEERS_AS_NEEDED)
            super().__init__(ordinal, address.value, 0)
            begin, size = _ADDRESS(), ctypes.c_size_t()
            try:
                driver.call(doing, "cuMemGetAddressRange_v2", ctypes.byref(begin), ctypes.byref(size), address)
            except CudaError:
                self.close()
                raise
            self.size = begin.value + size.value - address.value

    def close(self) -> None:
        """Nothing may read it any more, or be about to. Again does nothing."""
        address, self.address = self.address, 0
        if address:
            driver = _driver()
            with driver.on(self.ordinal):
                driver.call("giving GPU memory back", "cuIpcCloseMemHandle", address)


class DeviceArray:
    """See `as_array`: the CUDA array interface, version 2, of bytes."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}
