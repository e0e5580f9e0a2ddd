"""A staged image as tensors: its safetensors files mapped, nothing copied.

    stage/DIGEST/*.safetensors --mmap--> {checkpoint name: tensor}

The mapping is private (copy on write): reads share the page cache with every other rank of the node, and a loader
that writes into what it was given spoils neither the image nor, as a read-only mapping would, the process.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotweights.adapters.components import DRAFT, DRAFT_PREFIX

HEADER_BYTES_MAX = 100 << 20  # the limit of the safetensors library itself
_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.10 has no name for it

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class BadImage(Exception):
    """The folder is not a usable image; the text names the file or tensor."""


class Mismatch(Exception):
    """The image is not of this model; the text names the tensor."""


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint says of a tensor. `dtype` as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in an image: in a file, by its path in the folder, in bytes."""

    file: str
    spec: TensorSpec
    start: int
    end: int


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors spells it; torch's own name where it has no word for it."""
    return _NAMES.get(dtype, str(dtype))


def check_specs(image: Mapping[str, TensorSpec], served: Mapping[str, TensorSpec]) -> None:
    """Raises Mismatch, naming a tensor and what differs, unless both have the same tensors."""
    if missing := sorted(served.keys() - image.keys()):
        raise Mismatch(f"{_counted(missing, 'of the model')} not in the image, first {missing[0]} {served[missing[0]]}")
    if extra := sorted(image.keys() - served.keys()):
        raise Mismatch(f"{_counted(extra, 'of the image')} not in the model, first {extra[0]} {image[extra[0]]}")
    if different := [name for name in sorted(image) if image[name] != served[name]]:
        name = different[0]
        what = "shape" if image[name].shape != served[name].shape else "dtype"
        raise Mismatch(
            f"{_counted(different)} of another shape or dtype, first {name} in {what}: "
            f"{image[name]} in the image, {served[name]} in the model"
        )


def _counted(names: list[str], whose: str = "") -> str:
    """ "1 tensor of the image is", "2 tensors are"."""
    one = len(names) == 1
    return " ".join(filter(None, (str(len(names)), "tensor" if one else "tensors", whose, "is" if one else "are")))


def _header(path: Path, prefix: str = "") -> dict[str, Place]:
    """The tensors of one file by name, in the order of their bytes. Raises BadImage."""
    file_name = prefix + path.name
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_BYTES_MAX, size - 8):
            raise BadImage(f"{path.name}: its header of {length} bytes is larger than the file")
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise BadImage(f"{path.name}: its header is not JSON: {error}") from error
    places: dict[str, Place] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        if not 0 <= start <= end <= size:
            raise BadImage(f"{path.name}: tensor {name} lies outside the file")
        places[name] = Place(file_name, TensorSpec(entry["dtype"], tuple(entry["shape"])), start, end)
    return dict(sorted(places.items(), key=lambda item: item[1].start))


def _weight_files(folder: Path, draft: bool) -> Iterator[tuple[str, Path]]:
    """The files that hold the weights, with the prefix of their tensors: those of the index where there is one."""
    for prefix, part in (("", folder), (DRAFT_PREFIX, folder / DRAFT))[: 1 + draft]:
        index = part / "model.safetensors.index.json"
        if index.exists():
            paths = [part / str(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            paths = sorted(part.glob("*.safetensors"))
        yield from ((prefix, path) for path in paths)


def has_draft(folder: Path) -> bool:
    """Whether a checkpoint folder has a draft model in it."""
    return any((folder / DRAFT).glob("*.safetensors"))


def read_specs(folder: Path, *, draft: bool = False) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a checkpoint folder, from the headers alone. Raises BadImage, OSError.

    With `draft` those of the draft model in it too.
    """
    specs = {
        prefix + name: place.spec
        for prefix, path in _weight_files(folder, draft)
        for name, place in _header(path).items()
    }
    if not specs:
        raise BadImage(f"{folder}: no safetensors file with a tensor in it")
    return specs


def renamed(name: str, name_map: Mapping[str, str]) -> str:
    """The module's name of a checkpoint tensor.

    A key that ends in "." renames a prefix; the longest that fits wins.
    """
    if name in name_map:
        return name_map[name]
    prefixes = [key for key in name_map if key.endswith(".") and name.startswith(key)]
    if not prefixes:
        return name
    best = max(prefixes, key=len)
    return name_map[best] + name[len(best) :]


class MappedImage:
    """An image folder under mapping. `tensors` are in the order of their bytes: loaders meet whole layers."""

    def __init__(self, folder: Path, name_map: Mapping[str, str], *, draft: bool = False) -> None:
        """Maps every file, with `draft` those of the draft model too. Raises BadImage, OSError."""
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self.places: dict[str, Place] = {}
        self._maps: list[mmap.mmap] = []
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for prefix, path in _weight_files(folder, draft):
            self._map_file(path, prefix, name_map)
        if not self._tensors:
            raise BadImage(f"{folder}: no safetensors file with a tensor in it")

    def _map_file(self, path: Path, prefix: str, name_map: Mapping[str, str]) -> None:
        places = _header(path, prefix)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._stamps[path] = _stamp(os.fstat(file.fileno()))
        self._maps.append(mapped)
        for original, place in places.items():
            name = renamed(prefix + original, name_map)
            if name in self.specs:
                raise BadImage(f"tensor {original}: the name {name} is taken by another tensor")
            self.specs[name], self.places[name] = place.spec, place
            self._tensors[name] = _tensor_at(mapped, original, place)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors.items())

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By name; valid until `close`."""
        return self._tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all mapped files."""
        return sum(len(mapped) for mapped in self._maps)

    def populate(self) -> None:
        """Touches every page, so that the page faults do not fall into the pause."""
        for mapped in self._maps:
            try:
                mapped.madvise(_MADV_POPULATE_READ)
            except (AttributeError, OSError):  # another system, or an older kernel
                for at in range(0, len(mapped), mmap.PAGESIZE):
                    mapped[at]

    def check_unaltered(self) -> None:
        """Raises BadImage when somebody wrote to a file since it was mapped, or put another in its place."""
        for path, stamp in self._stamps.items():
            if not path.exists() or _stamp(path.stat()) != stamp:
                raise BadImage(f"{path.name} was altered after it was mapped")

    def close(self) -> bool:
        """Unmaps. False when something still holds a tensor of it: the files must then stay."""
        self._tensors.clear()
        remaining: list[mmap.mmap] = []
        for mapped in self._maps:
            try:
                mapped.close()
            except BufferError:
                remaining.append(mapped)
        self._maps = remaining
        return not remaining


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_ctime_ns


def torch_dtype(spec: TensorSpec) -> torch.dtype | None:
    """None for what is not known here."""
    return _DTYPES.get(spec.dtype)


def _tensor_at(mapped: mmap.mmap, name: str, place: Place) -> torch.Tensor:
    dtype = torch_dtype(place.spec)
    if dtype is None:
        raise BadImage(f"tensor {name}: its dtype {place.spec.dtype} is not known here")
    count = math.prod(place.spec.shape)
    if count * dtype.itemsize != place.end - place.start:
        raise BadImage(f"tensor {name}: {place.spec} does not take {place.end - place.start} bytes")
    if count == 0:
        return torch.empty(place.spec.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=place.start).reshape(place.spec.shape)
