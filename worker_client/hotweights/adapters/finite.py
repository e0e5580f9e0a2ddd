"""Values that are no numbers, NaN and infinities, counted in weights and looked for in caches.

Least and greatest of a chunk show at memory's speed whether it holds one (14 to 24 GB/s on one core of an EPYC;
asking every value, as `torch.isfinite` does, 0.4 to 1.8); only a chunk that does is counted value by value.
"""

from collections.abc import Iterable, Iterator

import torch

CHUNK_BYTES = 8 << 20
SHOWN_MAX = 5  # tensors that a refusal names

# The eight-bit types have no arithmetic; NaN, and infinity where there is one, are the greatest bit patterns.
_EIGHT_BITS = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
_WIDE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class NotFinite(Exception):
    """Weights with NaN or infinite values; the text names the tensors and how many values of each."""


def has_values_to_check(dtype: torch.dtype) -> bool:
    """Whether values of this type can be something else than numbers, and here it can be told."""
    return dtype in _WIDE or dtype in _EIGHT_BITS


def nonfinite_count(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite; 0 for types that have none."""
    return sum(_count(chunk) for chunk in _suspects(tensor))


def has_nonfinite(tensor: torch.Tensor) -> bool:
    """Whether any value is; stops at the first chunk that has one."""
    return any(True for _ in _suspects(tensor))


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises NotFinite. One pass over all bytes; meant for a thread beside a serving engine."""
    found = {name: (count, tensor.numel()) for name, tensor in tensors if (count := nonfinite_count(tensor))}
    if not found:
        return
    shown = ", ".join(f"{name} has {bad} of {all_}" for name, (bad, all_) in list(found.items())[:SHOWN_MAX])
    more = f", and {len(found) - SHOWN_MAX} more tensors" if len(found) > SHOWN_MAX else ""
    raise NotFinite(f"values that are NaN or infinite in {len(found)} tensors: {shown}{more}")


def _suspects(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The chunks with a value that is no number."""
    if not has_values_to_check(tensor.dtype):
        return
    flat, count = tensor.detach().reshape(-1), CHUNK_BYTES // tensor.dtype.itemsize
    for at in range(0, flat.numel(), count):
        chunk = flat[at : at + count]
        if _is_suspect(chunk):
            yield chunk


def _is_suspect(chunk: torch.Tensor) -> bool:
    if chunk.dtype in _EIGHT_BITS:
        return bool(_patterns(chunk).any())
    # NaN comes through both; an infinity is one of them.
    return not all(bool(torch.isfinite(edge)) for edge in torch.aminmax(chunk))


def _count(chunk: torch.Tensor) -> int:
    bad = _patterns(chunk) if chunk.dtype in _EIGHT_BITS else ~torch.isfinite(chunk)
    return int(bad.sum())


def _patterns(chunk: torch.Tensor) -> torch.Tensor:
    """Where the bits, without the sign, are those of NaN or infinity."""
    return (chunk.view(torch.uint8) & 0x7F) >= _EIGHT_BITS[chunk.dtype]
