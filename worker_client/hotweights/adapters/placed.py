"""Where values lie that are to be written to a device: on it, as far as a budget goes, or in pinned memory of the host.

host --upload while serving--> device memory     (within the budget)
     --pin in place----------> the host's own    (the rest: uploaded in the pause, a piece while the one before it
                                                  is written)
"""

import logging
from contextlib import suppress

import torch

from hotweights.transports import cuda_ipc
from hotweights.transports.errors import TransportError

log = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""Of places and values that are uploaded, and of values that are read back, at a time in the pause."""
IN_PLACE_BYTES = 33 << 20
"""From here on memory is pinned where it lies, which saves a copy. Of what is smaller, glibc may have two on one page,
and a page is pinned once."""


class Pin:
    """Memory that is pinned where it lies, as long as this is there."""

    def __init__(self, memory: torch.Tensor, ordinal: int) -> None:
        """Raises TransportError."""
        self._ordinal = ordinal
        self._memory: torch.Tensor | None = None
        cuda_ipc.pin(ordinal, memory.data_ptr(), memory.nbytes)
        self._memory = memory

    def __del__(self) -> None:
        if self._memory is not None:
            with suppress(TransportError):  # a GPU that has failed holds nothing any more
                cuda_ipc.unpin(self._ordinal, self._memory.data_ptr())


def pin_in_place(host: torch.Tensor, device: torch.device) -> Pin | None:
    """For a CUDA device; None where that cannot be."""
    if host.nbytes < IN_PLACE_BYTES or not host.is_contiguous():
        return None
    try:
        return Pin(host, torch.cuda.current_device() if device.index is None else device.index)
    except TransportError as error:  # a page of it is pinned for another, or there is no room for more
        log.info("%s", error)
        return None


class Placed:
    """Values for a device: on it, or in pinned memory of the host; the device reads both by itself."""

    def __init__(self, host: torch.Tensor, device: torch.device, on_device: bool, *, lasts: bool = True) -> None:
        """`lasts` says that `host` stays as it is, so that it need not be copied."""
        self._pin = None
        if on_device:
            self.tensor = host.to(device, copy=not lasts)
            return
        self.tensor = host if lasts else host.clone()
        if device.type == "cuda":
            self._pin = pin_in_place(self.tensor, device)
            if self._pin is None:
                self.tensor = self.tensor.pin_memory()


class _Slot:
    """Device memory that pieces pass through. Two of them: one is filled while the other is written from."""

    def __init__(self, device: torch.device) -> None:
        self._memory = {kind: torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) for kind in ("places", "new")}
        self.filled, self.free = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    def fill(self, places: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        filled = []
        for memory, host in zip(self._memory.values(), (places, values), strict=True):
            target = memory[: host.nbytes].view(host.dtype).view(host.shape)
            filled.append(target.copy_(host, non_blocking=True))
        return filled[0], filled[1]


class Uploads:
    """Pieces on their way to one CUDA device, each uploaded while the one before it is written."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = [_Slot(device) for _ in range(2)]
        self._next = 0

    def scatter(self, live: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
        """`places` and `values` are in pinned memory and no longer than PIECE_BYTES each."""
        slot, self._next = self._slots[self._next], (self._next + 1) % len(self._slots)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            there, new = slot.fill(places, values)
            slot.filled.record(self._stream)
        writing = torch.cuda.current_stream(live.device)
        writing.wait_event(slot.filled)
        live.index_copy_(0, there, new)
        slot.free.record(writing)


class Budget:
    """Device memory that prepared writes may still take."""

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes
        self._uploads: dict[torch.device, Uploads] = {}

    def placed(self, host: torch.Tensor, device: torch.device, *, lasts: bool = True) -> Placed:
        """On the device if it fits, else pinned. `lasts` as for Placed."""
        fits = host.nbytes <= self.left_bytes
        if fits:
            self.left_bytes -= host.nbytes
        return Placed(host, device, fits, lasts=lasts)

    def uploads(self, device: torch.device) -> Uploads | None:
        """For what does not fit; its own memory, 128 MiB, is beside the budget. None for what is no CUDA device."""
        if device.type != "cuda":
            return None
        if device not in self._uploads:
            self._uploads[device] = Uploads(device)
        return self._uploads[device]
