"""The way back of one rank: what every module held, and putting exactly that back.

    prepare (serving)   Copies: the bytes of every storage, cloned while the engine serves; weights do not change
    apply   (paused)    Snapshot: which tensor stands where, and the other attributes of every module
    undo    (paused)    attributes and tensors back in their places, bytes back into the same storages

This is for what vLLM's reload writes in the pause; what is written otherwise knows its own way back (`writes`).

The bytes return to the storages they came from, so addresses stay as CUDA graphs recorded them. The attributes
matter because vLLM's CPU build keeps packed weights in a closure (`layer.cpu_linear`): the old closure holds the old
memory. See FACTS on writing weights: a reload that failed half-way leaves meta tensors, buffered arguments and
wrapped loaders behind.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

OBJECT_DEPTH = 3


class ChangedSincePrepare(Exception):
    """Something replaced tensors of the model between the preparation and the apply."""


def _tensors(layers: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    return [t for layer in layers for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]


def storages_of(layers: Iterable[torch.nn.Module]) -> dict[int, torch.UntypedStorage]:
    """Every storage of their own tensors once, by address; tied weights and aliases share one."""
    storages = (tensor.untyped_storage() for tensor in _tensors(layers))
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def storages_bytes(layers: Iterable[torch.nn.Module]) -> int:
    """Memory that copies of their storages take."""
    return sum(storage.nbytes() for storage in storages_of(layers).values())


def storage_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage itself as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Copies:
    """The bytes of every storage of some modules, on the host."""

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        self._storages = storages_of(layers)
        self._bytes = {at: storage_bytes(storage).to("cpu", copy=True) for at, storage in self._storages.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for at, storage in self._storages.items():
            storage_bytes(storage).copy_(self._bytes[at])


@dataclass(frozen=True)
class _HeldTensor:
    """A tensor object, its data and its attributes (loaders are wrapped on live tensors during a reload)."""

    tensor: torch.Tensor
    data: torch.Tensor
    attributes: dict[str, Any]

    def put_back(self) -> None:
        if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.dtype != self.data.dtype:
            self.tensor.data = self.data
        self.tensor.__dict__.clear()
        self.tensor.__dict__.update(self.attributes)


class _HeldModule:
    """What one module consists of, children apart."""

    _REGISTRIES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._registries = {name: dict(getattr(module, name)) for name in self._REGISTRIES}
        self._non_persistent = set(module._non_persistent_buffers_set)
        self._attributes = {
            name: value
            for name, value in module.__dict__.items()
            if name not in (*self._REGISTRIES, "_non_persistent_buffers_set")
        }

    def put_back(self) -> None:
        state = self._module.__dict__
        kept = {*self._REGISTRIES, "_non_persistent_buffers_set", *self._attributes}
        for name in [name for name in state if name not in kept]:
            del state[name]
        state.update(self._attributes)
        for name, entries in self._registries.items():
            state[name].clear()
            state[name].update(entries)
        self._module._non_persistent_buffers_set = self._non_persistent


def objects_of(layers: Iterable[torch.nn.Module]) -> list[Any]:
    """Plain objects of vLLM's that layers hold, each once: quantisation schemes, their kernels, attention backends."""
    found: dict[int, Any] = {}

    def walk(value: Any, depth: int) -> None:
        of_vllm = type(value).__module__.startswith("vllm.") and not type(value).__module__.startswith("vllm.config")
        if isinstance(value, (torch.nn.Module, torch.Tensor, type)) or not of_vllm or id(value) in found:
            return
        if isinstance(state := getattr(value, "__dict__", None), dict):
            found[id(value)] = value
            for part in state.values() if depth else ():
                walk(part, depth - 1)

    for layer in layers:
        for value in layer.__dict__.values():
            walk(value, OBJECT_DEPTH)
    return list(found.values())


class Snapshot:
    """Which tensor stands where, and what vLLM's own objects of some layers hold. Cheap: references only."""

    def __init__(self, module: torch.nn.Module, layers: Iterable[torch.nn.Module] = ()) -> None:
        self._objects = [(thing, dict(thing.__dict__)) for thing in objects_of(layers)]
        self._modules = [_HeldModule(layer) for layer in module.modules()]
        unique = {id(tensor): tensor for tensor in _tensors(module.modules())}
        self._tensors = [_HeldTensor(t, t.data, dict(t.__dict__)) for t in unique.values()]

    def put_back(self) -> None:
        for thing, state in self._objects:
            thing.__dict__.clear()
            thing.__dict__.update(state)
        for module in self._modules:
            module.put_back()
        for tensor in self._tensors:
            tensor.put_back()
