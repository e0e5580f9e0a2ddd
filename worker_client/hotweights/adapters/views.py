"""Tensors as views of the storages that they share."""

from collections.abc import Iterable, Mapping
from operator import itemgetter

import torch


def by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """By the address of what they lie in, then by name."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    return found


def moved(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The same view of another storage."""
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(storage, *place)


def are_all(views: Iterable[torch.Tensor], size: int) -> bool:
    """Whether views of a storage of so many bytes leave nothing of it out."""
    end = 0
    begun = ((int(view.storage_offset()) * view.itemsize, view) for view in views)
    for begin, view in sorted(begun, key=itemgetter(0)):
        if begin > end or not view.is_contiguous():
            return False
        end = max(end, begin + view.nbytes)
    return end == size
