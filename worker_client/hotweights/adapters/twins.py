"""Twins of a live model's modules: the same classes and attributes over other memory, or over none.

    live module --Twins--> twin      registries and tensors its own, everything else the same
    live storage ---------> clone, or meta: shapes, strides and dtypes without storage

Tensors that are one stay one, and methods bound to a live module are bound to its twin. vLLM's reload is told of the
twins as it was of the live modules, until `forget`.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from hotweights.adapters.undo import storage_bytes

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_LOADERS_MODULE = "vllm.model_executor.model_loader.weight_utils"  # its closures write into the given parameter only


class NoShadow(Exception):
    """The model has something that is not known to be safe to do apart from it; the text names it."""


class Twins:
    """The twin of every module of `live`. Raises NoShadow."""

    def __init__(self, live: torch.nn.Module, cloned: Callable[[torch.nn.Module], bool]) -> None:
        """`cloned` says of which modules the tensors have memory; modules that share some have the same answer."""
        self.of: dict[torch.nn.Module, torch.nn.Module] = {}
        self.initial: dict[torch.nn.Module, dict[str, Any]] = {}
        self._cloned = cloned
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        for layer in live.modules():
            self.of[layer] = layer.__class__.__new__(layer.__class__)
        try:
            for layer, twin in self.of.items():
                self._fill(layer, twin)
                self.initial[layer] = dict(twin.__dict__)
        except Exception:
            self.forget()  # the reload's books would keep what was filled for ever
            raise
        self.model = self.of[live]

    def _fill(self, layer: torch.nn.Module, twin: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        state = {name: self._rebound(value) for name, value in layer.__dict__.items() if name not in REGISTRIES}
        clones = self._cloned(layer)
        state["_parameters"] = {name: self._twin(tensor, clones) for name, tensor in layer._parameters.items()}
        state["_buffers"] = {name: self._twin(tensor, clones) for name, tensor in layer._buffers.items()}
        state["_modules"] = {name: None if child is None else self.of[child] for name, child in layer._modules.items()}
        state["_non_persistent_buffers_set"] = set(layer._non_persistent_buffers_set)
        twin.__dict__.update(state)
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            raise NoShadow(f"{type(layer).__name__} is being loaded by something else")
        parameters, buffers = info.restore_metadata
        layerwise.LAYERWISE_INFO[twin] = type(info)(
            restore_metadata=(self._metadata(parameters), self._metadata(buffers)), restore_device=info.restore_device
        )

    def _metadata(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reload changes these too: it wraps the loaders that they carry."""
        return {name: self._like(tensor, torch.empty_like(tensor.data)) for name, tensor in tensors.items()}

    def _twin(self, tensor: torch.Tensor | None, clones: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._tensors:
            data = self._clone(tensor) if clones else _without_memory(tensor)
            self._tensors[id(tensor)] = self._like(tensor, data)
        return self._tensors[id(tensor)]

    def _clone(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages or not storage.nbytes():
            self._storages[storage.data_ptr()] = storage_bytes(storage).clone().untyped_storage()
        clone = self._storages[storage.data_ptr()]
        return torch.empty(0, dtype=tensor.dtype).set_(clone, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _like(self, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """`data` with the class and attributes of `tensor`, its loaders bound to the twins."""
        data.__class__ = tensor.__class__
        data.__dict__ = {name: self._rebound(_unwrapped(value)) for name, value in tensor.__dict__.items()}
        for name, value in data.__dict__.items():
            _check_loader(name, value)
        return data

    def _rebound(self, value: Any, depth: int = 3) -> Any:
        """A live module becomes its twin, in lists too, and a method of one the twin's."""
        if isinstance(value, torch.nn.Module):
            return self.of.get(value, value)
        if type(value) in (list, tuple, dict) and depth and holds_modules(value):
            if isinstance(value, dict):
                return {name: self._rebound(item, depth - 1) for name, item in value.items()}
            return type(value)(self._rebound(item, depth - 1) for item in value)
        if isinstance(value, MethodType) and isinstance(value.__self__, torch.nn.Module):
            if value.__self__ not in self.of:
                raise NoShadow(f"{value.__qualname__} is bound to a module outside the model")
            return MethodType(value.__func__, self.of[value.__self__])
        return value

    def as_created(self) -> None:
        """Every twin has the tensors, without memory, that its layer was created with: what loaders expect."""
        from vllm.model_executor.model_loader.reload import layerwise, meta

        for twin in self.of.values():
            info = layerwise.get_layerwise_info(twin)
            if any(info.restore_metadata):  # else it is as vLLM created it, or vLLM did not create it
                meta.restore_layer_on_meta(twin, info)

    def forget(self) -> None:
        """Takes the twins out of the reload's books and breaks their cycles: their memory goes with its last user."""
        from vllm.model_executor.model_loader.reload import layerwise

        for twin in self.of.values():
            layerwise.LAYERWISE_INFO.pop(twin, None)
            layerwise.LOADING_LAYERS.discard(twin)
            twin.__dict__.clear()
        self.of.clear()
        self.initial.clear()
        self._tensors.clear()
        self._storages.clear()


def holds_modules(value: Any, depth: int = 3) -> bool:
    """Whether a container leads to modules."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set)) and depth:
        return any(holds_modules(item, depth - 1) for item in value)
    return isinstance(value, torch.nn.Module)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _unwrapped(value: Any) -> Any:
    """A loader without the wrappers that an earlier reload left on it; they are bound to the live layer."""
    while getattr(value, "__name__", "") == "online_process_loader":
        value = value.__wrapped__
    return value


def _check_loader(name: str, value: Any) -> None:
    if isinstance(value, FunctionType) and value.__closure__ and value.__module__ != _LOADERS_MODULE:
        raise NoShadow(f"the {name} of a tensor is a closure of {value.__module__}")
