"""Host memory for one storage after the other: new pages cost more than what is copied into them."""

import torch

from hotweights.adapters.placed import pin_in_place
from hotweights.adapters.undo import storage_bytes


class Scratch:
    """As much as the largest so far took. Pinned for a CUDA device, which copies there several times as fast.

    What was taken is good until the next is.
    """

    def __init__(self, device: torch.device) -> None:
        """For what comes from that device."""
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned: object = None

    def take(self, size: int) -> torch.UntypedStorage:
        """So many bytes of whatever."""
        if size > self._memory.numel():
            self._pinned = None  # before its memory goes
            self._memory = torch.empty(size, dtype=torch.uint8)
            if self._device.type == "cuda":
                self._pinned = pin_in_place(self._memory, self._device)
        taken: torch.UntypedStorage = self._memory.untyped_storage()[:size]
        return taken

    def copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The bytes of a storage of any device."""
        taken = self.take(storage.nbytes())
        storage_bytes(taken).copy_(storage_bytes(storage))
        return taken
