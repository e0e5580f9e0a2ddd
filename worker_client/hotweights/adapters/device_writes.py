"""Writes into a device's memory: places and values lie there before the pause, as far as a budget goes.

    host: old values, new values --upload while serving--> device memory   (within the budget)
                                 --copy-----------------> pinned memory    (the rest: uploaded in the pause)

In the pause there are one or a few launches a storage and no copy back but of sums. Nothing is moved or allocated anew,
so that addresses stay as CUDA graphs recorded them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from blake3 import blake3

from hotweights.adapters.undo import storage_bytes
from hotweights.adapters.writes import Difference, Write, proof_of

PLACES_AT_ONCE = 1 << 22  # of what is uploaded or read back in the pause: 32 MiB of places


@dataclass
class Budget:
    """Device memory that prepared writes may still take."""

    left_bytes: int

    def placed(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """On the device if it fits, else in pinned memory of the host."""
        if host.nbytes <= self.left_bytes:
            self.left_bytes -= host.nbytes
            return host.to(device)
        return host.pin_memory() if device.type == "cuda" else host


class DeviceElements:
    """Some values of a storage, or runs of them, by their places."""

    on_host = False

    def __init__(
        self, live: torch.Tensor, places: torch.Tensor, new: torch.Tensor, old: torch.Tensor, budget: Budget
    ) -> None:
        """`live` is the storage on its device, of shape (runs, values of a run); the others are on the host."""
        self._live = live
        # First the places and what is to be: the way back is the rarer one.
        self._places = budget.placed(places, live.device)
        self._new = budget.placed(new, live.device)
        self._old = budget.placed(old, live.device)
        self.new_bytes = new.nbytes
        self.new_proof, self.old_proof = (_proof(_pieces(values)) for values in (new, old))

    @torch.no_grad()
    def write(self) -> None:
        self._scatter(self._new)

    @torch.no_grad()
    def undo(self) -> None:
        self._scatter(self._old)

    def _scatter(self, values: torch.Tensor) -> None:
        device = self._live.device
        if self._places.device == device == values.device:
            self._live.index_copy_(0, self._places, values)
            return
        for places, part in zip(_pieces(self._places), _pieces(values), strict=True):
            self._live.index_copy_(0, places.to(device, non_blocking=True), part.to(device, non_blocking=True))

    def proof(self) -> bytes:
        device = self._live.device
        return _proof(self._live.index_select(0, places.to(device)) for places in _pieces(self._places))


class DeviceWhole:
    """All of a storage."""

    on_host = False

    def __init__(self, live: torch.Tensor, new: torch.Tensor, old: torch.Tensor, budget: Budget) -> None:
        """`live` is the storage on its device as bytes, `new` and `old` are bytes on the host."""
        self._live = live
        self._new = budget.placed(new, live.device)
        self._old = budget.placed(old, live.device)
        self.new_bytes = new.nbytes
        self.new_proof, self.old_proof = proof_of(new), proof_of(old)

    @torch.no_grad()
    def write(self) -> None:
        self._live.copy_(self._new, non_blocking=True)

    @torch.no_grad()
    def undo(self) -> None:
        self._live.copy_(self._old, non_blocking=True)

    def proof(self) -> bytes:
        return proof_of(self._live)


def device_write(live: torch.UntypedStorage, found: Difference, budget: Budget) -> Write:
    """What writes a difference to its storage, on a device; both sides of `found` are in host memory."""
    now, to_be = torch.from_numpy(found.now), torch.from_numpy(found.to_be)
    data = storage_bytes(live)
    if not found.run:
        return DeviceWhole(data, to_be.view(torch.uint8), now.view(torch.uint8), budget)
    places = torch.from_numpy(found.places)
    new, old = (values.view(-1, found.run)[places] for values in (to_be, now))
    return DeviceElements(data.view(now.dtype).view(-1, found.run), places, new, old, budget)


def _pieces(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """By so many places at a time: what is needed beside the budget is bounded."""
    return iter(torch.split(values, PLACES_AT_ONCE))


def _proof(pieces: Iterable[torch.Tensor]) -> bytes:
    hasher = blake3()
    for values in pieces:
        hasher.update(proof_of(values.contiguous().view(-1).view(torch.uint8)))
    return hasher.digest()
