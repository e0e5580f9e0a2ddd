"""NaN in a rank's KV cache outlives the weights that made it.

A block that a request gets anew still holds what the last one left behind its own tokens. Attention weighs that with
zero, and zero times NaN is NaN: an engine that once computed NaN goes on answering nonsense under healed weights, until
the cache is cleared (FACTS, "Pausing"). Clearing costs the pause as much as writing the whole cache, so it is done only
where it is needed:

    going back, after the engine has run on the other version   always: the version may have been the reason
    going to another version                                    where a look beside serving found such a value
    undoing an apply that failed, in the same window            never: no step ran in between

vLLM keeps the caches as tensors, in hybrid models as lists of them (attention, and the states of Mamba layers), often
as views of one allocation: whole storages are looked at and cleared, each once.
"""

from collections.abc import Iterator
from typing import Any

import torch

from hotweights.adapters.finite import has_nonfinite, has_values_to_check
from hotweights.adapters.undo import storage_bytes

# A cache in eight bits is kept as bytes: what e5m2 calls infinite or NaN covers what e4m3 calls NaN.
_READ_AS = {torch.uint8: torch.float8_e5m2}


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from _tensors(item)


def _storages(runner: Any) -> dict[tuple[int, torch.dtype], torch.UntypedStorage]:
    """Every storage once for each type it is read as; a model without attention has none."""
    found = ((tensor.untyped_storage(), tensor.dtype) for tensor in _tensors(getattr(runner, "kv_caches", ())))
    return {(storage.data_ptr(), dtype): storage for storage, dtype in found if storage.nbytes()}


def may_be_spoilt(runner: Any) -> bool:
    """Whether a value is NaN or infinite, or of a type in which that cannot be told. Reads beside the engine."""
    return any(_may_be_spoilt(storage, dtype) for (_, dtype), storage in _storages(runner).items())


def _may_be_spoilt(storage: torch.UntypedStorage, dtype: torch.dtype) -> bool:
    dtype = _READ_AS.get(dtype, dtype)
    if not has_values_to_check(dtype):
        return True
    data = storage_bytes(storage)
    return has_nonfinite(data[: len(data) - len(data) % dtype.itemsize].view(dtype))


@torch.no_grad()
def clear(runner: Any) -> None:
    """Zeros, as vLLM allocates them. Only while paused, and with no request's blocks in use."""
    for storage in {at: storage for (at, _), storage in _storages(runner).items()}.values():
        storage_bytes(storage).zero_()
