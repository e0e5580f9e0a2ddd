"""Safetensors headers, read without touching the tensors behind them.

A file is 8 bytes (length of the header, little endian), the header (JSON), then the tensors back to
back. The format's own rules (https://huggingface.co/docs/safetensors, "Format") leave no gap and no
overlap; we insist, because a reader that maps the file trusts every offset.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

from hotweights.worker_client.image.errors import BadImage

# As the safetensors library: a longer header is an attack or an accident.
HEADER_BYTES_MAX = 100_000_000
# More than any framework has; bounds the work a hostile header can ask for.
DIMENSIONS_MAX = 64
# The format counts in 64 bits, and so does a manifest.
COUNT_MAX = (1 << 64) - 1

# The names safetensors 0.8 knows. Bits, because some are smaller than a byte.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class TensorSpan(NamedTuple):
    """A tensor and where its bytes lie. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds. `tensors` are in the order of their offsets."""

    tensors: tuple[TensorSpan, ...]
    data_start: int
    size_bytes: int


class _Duplicate(ValueError):
    """A key that stands twice in a JSON object."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises ValueError, with the problem as its text."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > DIMENSIONS_MAX:
        raise ValueError(f"{len(shape)} dimensions; at most {DIMENSIONS_MAX} are possible")
    for length in shape:
        bits *= length
        if bits > COUNT_MAX:
            raise ValueError(f"{dtype} of shape {list(shape)} is larger than 64 bits count")
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not end at a whole byte")
    return bits // 8


def read_header(path: Path, name: str = "") -> Header:
    """Reads and checks the header of a safetensors file. Raises BadImage, OSError.

    `name` names the file in errors; the cache of Hugging Face gives its blobs names no one knows.
    """
    name = name or path.name
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadImage(name, "", f"truncated: {size} bytes, not even the header's length")
        length = int.from_bytes(prefix, "little")
        if length > HEADER_BYTES_MAX:
            raise BadImage(name, "", f"header too large: {length} bytes, at most {HEADER_BYTES_MAX} are allowed")
        if 8 + length > size:
            raise BadImage(name, "", f"header of {length} bytes is larger than the file of {size}")
        raw = file.read(length)
    if len(raw) < length:
        raise BadImage(name, "", f"truncated while it was read: {len(raw)} of {length} header bytes")
    return parse_header(name, raw, size)


def parse_header(file: str, raw: bytes, size_bytes: int) -> Header:
    """Checks the header `raw` of a file of `size_bytes` in all. `file` names it in errors."""
    entries = _parse_json(file, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise BadImage(file, "", "__metadata__ is not an object of texts")
    data_start = 8 + len(raw)
    spans = [_parse_span(file, name, entry, data_start) for name, entry in entries.items()]
    # An empty tensor goes before the one that starts where it does.
    spans.sort(key=lambda span: (span.offset, span.size_bytes, span.name))
    _check_layout(file, spans, data_start, size_bytes)
    return Header(tuple(spans), data_start, size_bytes)


def _parse_json(file: str, raw: bytes) -> dict[str, object]:
    def reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise _Duplicate(counts.most_common(1)[0][0])
        return found

    if raw[:1] != b"{":
        raise BadImage(file, "", "header is not JSON: it does not begin with '{'")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=reject_duplicates, parse_constant=_reject_constant)
    except _Duplicate as duplicate:
        raise BadImage(file, str(duplicate), "stands twice in the header") from None
    except (ValueError, RecursionError) as error:
        raise BadImage(file, "", f"header is not JSON: {error}") from None
    if not isinstance(header, dict):  # unreachable after the first byte; keeps the type honest
        raise BadImage(file, "", "header is not a JSON object")
    return header


def _reject_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")  # Python's reader takes NaN and Infinity


def _parse_span(file: str, name: str, entry: object, data_start: int) -> TensorSpan:
    if not name:
        raise BadImage(file, "", "a tensor without a name")
    if not _is_text(name):
        raise BadImage(file, name, "its name is not Unicode: half of a surrogate pair")
    if not isinstance(entry, dict):
        raise BadImage(file, name, "its entry is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise BadImage(file, name, "has no dtype")
    if not _are_counts(shape):
        raise BadImage(file, name, f"shape {shape!r} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise BadImage(file, name, f"data_offsets {offsets!r} are not two positions")
    begin, end = offsets
    if end < begin:
        raise BadImage(file, name, f"its bytes end ({end}) before they begin ({begin})")
    try:
        expected = tensor_bytes(dtype, shape)
    except ValueError as problem:
        raise BadImage(file, name, str(problem)) from None
    if end - begin != expected:
        raise BadImage(file, name, f"{dtype} of shape {shape} needs {expected} bytes, its offsets span {end - begin}")
    return TensorSpan(name, dtype, tuple(shape), data_start + begin, expected)


def _is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold. JSON's escapes can write halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_counts(value: object) -> TypeGuard[list[int]]:
    # bool is an int in Python, not in a shape.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= COUNT_MAX for item in value)


def _check_layout(file: str, spans: Sequence[TensorSpan], data_start: int, size_bytes: int) -> None:
    position, before = data_start, ""
    for span in spans:
        if span.offset < position:
            raise BadImage(file, span.name, f"overlaps tensor {before!r} by {position - span.offset} bytes")
        if span.offset > position:
            raise BadImage(file, span.name, f"a gap of {span.offset - position} bytes before it")
        position, before = span.offset + span.size_bytes, span.name
        if position > size_bytes:
            raise BadImage(file, span.name, f"truncated: the file lacks {position - size_bytes} of its bytes")
    if position < size_bytes:
        raise BadImage(file, before, f"{size_bytes - position} bytes behind it belong to no tensor")
