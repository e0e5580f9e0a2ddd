"""An image in GPU memory that another process of this node lends: its tensors where they are, nothing copied.

    the agent's handles --Borrowed--> memory --seal right?--> {checkpoint name: tensor on a device}

Opened while the engine serves; in the pause whole tensors are copied from it, device to device. What was copied is
proven like everything else, against the staged image; where it is something else, it is written from the host. Where
it cannot be opened, or its lease is nearly over, values come from the host from the beginning; `told` says so.
"""

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from hotweights.adapters.mapped import MappedImage, Place, torch_dtype
from hotweights.transports import cuda_ipc
from hotweights.transports.errors import TransportError

log = logging.getLogger(__name__)

MARGIN_S = 10.0
"""A lease that ends sooner is taken for one that is over: the pause in which it is read takes milliseconds."""

Ranges = Sequence[tuple[str, int, int, int]]


class Memory(Protocol):
    """Memory of another process that is open here."""

    def read(self, offset: int, size: int) -> bytes: ...

    def as_array(self, offset: int, size: int) -> Any: ...

    def close(self) -> None: ...


def open_memory(device_uuid: str, handle: bytes, device: torch.device) -> Memory:
    """For a device of this process to read. Raises TransportError: also where it is out of that one's reach."""
    if device.type != "cuda":
        raise cuda_ipc.NoCuda(f"{device_uuid} is out of reach of {device}")
    reader = torch.cuda.current_device() if device.index is None else device.index
    ordinal = cuda_ipc.devices().get(device_uuid)
    if ordinal is None:
        raise cuda_ipc.NoCuda(f"this process does not see {device_uuid}")
    if not cuda_ipc.can_reach(reader, ordinal):
        raise cuda_ipc.NoCuda(f"GPU {reader} has no peer access to {device_uuid}")
    return cuda_ipc.Borrowed(reader, handle)


class Reader(Protocol):
    """Who reads it in the pause."""

    def let_go(self) -> None: ...


class LentImage:
    """Of `image`, as far as it is lent and within reach. `tensors` by the module's names, valid until `close`."""

    def __init__(
        self, memories: Sequence[Mapping[str, Any]], ends_at: float, image: MappedImage, device: torch.device
    ) -> None:
        """`memories` by `device`, `handle`, `seal` and `ranges`; `ends_at` is of time.monotonic()."""
        self._ends_at = ends_at
        self._opened: list[Memory] = []
        self._readers: list[weakref.ref[Reader]] = []
        self._devices: list[str] = []
        self._problems: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        try:
            for memory in memories:
                self._open(memory, image, device)
        except BaseException:  # whatever it is, nothing stays mapped; raised on
            self.close()
            raise

    def _open(self, memory: Mapping[str, Any], image: MappedImage, device: torch.device) -> None:
        name = str(memory["device"])
        try:
            opened = open_memory(name, bytes(memory["handle"]), device)
            self._opened.append(opened)
            _check_seal(opened, bytes(memory["seal"]), name)
            self.tensors.update(_tensors(opened, memory["ranges"], image.places, device))
        except (TransportError, RuntimeError) as error:  # torch has no narrower name for what CUDA refuses
            log.warning("values come from host memory: %s", error)
            self._problems.append(f"host memory: {error}")
        else:
            self._devices.append(name)

    def told(self, used_bytes: int) -> list[str]:
        """Lines for status, when that much is written from it."""
        used = f"cuda-ipc: {used_bytes >> 20} MiB of {', '.join(self._devices)} of another process"
        return [*([used] if used_bytes else []), *self._problems]

    @property
    def is_readable(self) -> bool:
        """Whether the lease goes on for long enough to be read now."""
        return bool(self.tensors) and time.monotonic() < self._ends_at - MARGIN_S

    def on_close(self, reader: "Reader") -> None:
        """Who holds tensors of it, and lets go of them then."""
        self._readers.append(weakref.ref(reader))

    def close(self) -> None:
        """Gives everything back. Nothing reads it any more. Again does nothing."""
        for held in self._readers:
            if (reader := held()) is not None:
                reader.let_go()
        self._readers.clear()
        self.tensors.clear()
        opened, self._opened = self._opened, []
        for memory in opened:
            try:
                memory.close()
            except TransportError as error:
                log.warning("%s", error)


def _check_seal(memory: Memory, seal: bytes, name: str) -> None:
    if memory.read(0, len(seal)) != seal:
        raise TransportError(f"what was lent on {name} is something else by now")


def _tensors(
    memory: Memory, ranges: Ranges, places: Mapping[str, Place], device: torch.device
) -> dict[str, torch.Tensor]:
    """Those that lie in one range as a whole."""
    by_file: dict[str, list[tuple[int, int, int]]] = {}
    for file, file_offset, memory_offset, size in ranges:
        by_file.setdefault(file, []).append((file_offset, memory_offset, size))
    found: dict[str, torch.Tensor] = {}
    for name, place in places.items():
        for file_offset, memory_offset, size in by_file.get(place.file, ()):
            if file_offset <= place.start < place.end <= file_offset + size:
                at = memory_offset + place.start - file_offset
                tensor = _tensor(memory, at, place, device)
                if tensor is not None:
                    found[name] = tensor
                break
    return found


def _tensor(memory: Memory, at: int, place: Place, device: torch.device) -> torch.Tensor | None:
    """None for what is not aligned as its type asks."""
    dtype = torch_dtype(place.spec)
    if dtype is None or at % dtype.itemsize:
        return None
    lying = memory.as_array(at, place.end - place.start)
    data = torch.as_tensor(lying, device=device)
    if (there := getattr(lying, "__cuda_array_interface__", None)) and data.data_ptr() != there["data"][0]:
        raise TransportError(f"{device} reads the other's memory by copying it first")
    return data.view(dtype).reshape(place.spec.shape)
