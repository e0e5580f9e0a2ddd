"""A shadow of a live model: the same modules over other memory, for vLLM's own reload to fill beside the engine.

    live module --twin--> shadow module      class and attributes the same, registries and tensors its own
    live storage -clone-> shadow storage     tied tensors stay tied

What the reload changed in the shadow is read off as a list of writes: bytes for live storages, and the functions of
packed layers (`layer.cpu_linear`), which own the memory they compute from. A model in which anything else could change,
or which could lead the reload out of the shadow into the live modules, has no shadow: `NoShadow` names why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

from hotweights.adapters.undo import storage_bytes

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_PACKED = "cpu_linear"
_RELOAD_MARKS = {"_do_torchao_reload", "_original_do_torchao_reload"}  # the reload's own, on the model itself
_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
_LOADERS_MODULE = "vllm.model_executor.model_loader.weight_utils"  # its closures write into the given parameter only


class NoShadow(Exception):
    """The model has something that is not known to be safe to assemble apart; the text names it."""


@dataclass(frozen=True)
class Bytes:
    """New values for a live tensor, in place."""

    live: torch.Tensor
    new: torch.Tensor

    def write(self) -> None:
        self.live.data.copy_(self.new.data)


@dataclass(frozen=True)
class Attribute:
    """A new function for a live layer."""

    layer: torch.nn.Module
    name: str
    value: Any

    def write(self) -> None:
        self.layer.__dict__[self.name] = self.value


Write = Bytes | Attribute


class Shadow:
    """The twin of every module of `live`. Raises NoShadow."""

    def __init__(self, live: torch.nn.Module) -> None:
        self._twins: dict[torch.nn.Module, torch.nn.Module] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._initial: dict[torch.nn.Module, dict[str, Any]] = {}
        for name, layer in live.named_modules():
            _survey(name, layer)
        for layer in live.modules():
            self._twins[layer] = layer.__class__.__new__(layer.__class__)
        try:
            for layer, twin in self._twins.items():
                self._fill(layer, twin)
                self._initial[layer] = dict(twin.__dict__)
        except Exception:
            self.forget()  # the reload's books would keep what was filled for ever
            raise
        self.model = self._twins[live]

    def _fill(self, layer: torch.nn.Module, twin: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        state = {name: self._rebound(value) for name, value in layer.__dict__.items() if name not in REGISTRIES}
        state["_parameters"] = {name: self._clone(tensor) for name, tensor in layer._parameters.items()}
        state["_buffers"] = {name: self._clone(tensor) for name, tensor in layer._buffers.items()}
        state["_modules"] = {
            name: None if child is None else self._twins[child] for name, child in layer._modules.items()
        }
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

    def _clone(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages or not storage.nbytes():
                self._storages[storage.data_ptr()] = storage_bytes(storage).clone().untyped_storage()
            data = torch.empty(0, dtype=tensor.dtype).set_(
                self._storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            self._tensors[id(tensor)] = self._like(tensor, data)
        return self._tensors[id(tensor)]

    def _like(self, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """`data` with the class and attributes of `tensor`, its loaders bound to the twins."""
        data.__class__ = tensor.__class__
        data.__dict__ = {name: self._rebound(_unwrapped(value)) for name, value in tensor.__dict__.items()}
        for name, value in data.__dict__.items():
            _check_loader(name, value)
        return data

    def _rebound(self, value: Any) -> Any:
        """A method of a live module becomes the twin's."""
        if isinstance(value, MethodType) and isinstance(value.__self__, torch.nn.Module):
            if value.__self__ not in self._twins:
                raise NoShadow(f"{value.__qualname__} is bound to a module outside the model")
            return MethodType(value.__func__, self._twins[value.__self__])
        return value

    def writes(self) -> list[Write]:
        """What the reload of the shadow changed. Raises NoShadow when that is not only tensors and packed layers."""
        found: list[Write] = []
        placed: dict[int, int] = {}
        seen: set[int] = set()
        for layer, twin in self._twins.items():
            for live, new in self._tensor_pairs(layer, twin):
                if id(live) in seen or not live.numel():
                    continue
                seen.add(id(live))
                at, to = live.untyped_storage().data_ptr(), new.untyped_storage().data_ptr()
                if placed.setdefault(at, to) != to:
                    raise NoShadow(f"tensors of {type(layer).__name__} were tied and are not tied after a reload")
                if not torch.equal(_as_bytes(live), _as_bytes(new)):
                    found.append(Bytes(live, new))
        own = set(placed.values())
        for layer, twin in self._twins.items():
            found += _changed_attributes(layer, self._initial[layer], twin, own)
        return found

    def _tensor_pairs(
        self, layer: torch.nn.Module, twin: torch.nn.Module
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for registry in ("_parameters", "_buffers"):
            lives, news = getattr(layer, registry), getattr(twin, registry)
            if {name for name in lives if lives[name] is not None} != {name for name in news if news[name] is not None}:
                raise NoShadow(f"a reload changes which tensors {type(layer).__name__} has")
            for name, live in lives.items():
                if live is None:
                    continue
                new = news[name]
                if (live.dtype, live.shape, live.stride()) != (new.dtype, new.shape, new.stride()):
                    raise NoShadow(f"a reload changes the layout of {type(layer).__name__}.{name}")
                yield live, new

    def forget(self) -> None:
        """Takes the shadow out of the reload's books and breaks its cycles: its memory goes with the last write."""
        from vllm.model_executor.model_loader.reload import layerwise

        for twin in self._twins.values():
            layerwise.LAYERWISE_INFO.pop(twin, None)
            layerwise.LOADING_LAYERS.discard(twin)
            twin.__dict__.clear()
        self._twins.clear()
        self._initial.clear()
        self._tensors.clear()
        self._storages.clear()


def _survey(name: str, layer: torch.nn.Module) -> None:
    """Raises NoShadow unless vLLM's reload of this layer is known to stay within its own tensors."""
    from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer

    where = f"{name or 'the model'} ({type(layer).__name__})"
    method = getattr(layer, "quant_method", None)
    if method is not None and type(method).__name__ not in _METHODS:
        raise NoShadow(f"{where} has the method {type(method).__name__}")
    if is_deferred_attention_layer(layer):
        processing = getattr(type(layer), "process_weights_after_loading", None)
        of_impl = getattr(type(getattr(layer, "impl", None)), "process_weights_after_loading", None)
        # The base's does nothing; another could write into the impl, which the shadow shares with the live layer.
        if processing is not Attention.process_weights_after_loading or not _is_of_backend_base(of_impl):
            raise NoShadow(f"{where} processes its weights in a way of its own")
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None and (tensor.device.type != "cpu" or isinstance(tensor, torch.nn.UninitializedParameter)):
            raise NoShadow(f"{where} has tensors that are not in host memory")
    for attribute, value in layer.__dict__.items():
        if attribute not in REGISTRIES and _leads_to_a_module(value):
            raise NoShadow(f"{where} refers to modules through {attribute}")


def _is_of_backend_base(function: Callable[..., Any] | None) -> bool:
    return getattr(function, "__qualname__", "").startswith("AttentionImplBase.")


def _leads_to_a_module(value: Any, depth: int = 3) -> bool:
    """Whether a loader could walk from an attribute to live modules or parameters."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set)) and depth:
        return any(_leads_to_a_module(item, depth - 1) for item in value)
    return isinstance(value, (torch.nn.Module, torch.nn.Parameter))


def _unwrapped(value: Any) -> Any:
    """A loader without the wrappers that an earlier reload left on it; they are bound to the live layer."""
    while getattr(value, "__name__", "") == "online_process_loader":
        value = value.__wrapped__
    return value


def _check_loader(name: str, value: Any) -> None:
    if isinstance(value, FunctionType) and value.__closure__ and value.__module__ != _LOADERS_MODULE:
        raise NoShadow(f"the {name} of a tensor is a closure of {value.__module__}")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Of equal values that differ in bits (zeros of both signs, NaN) the bits count."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _changed_attributes(
    layer: torch.nn.Module, initial: dict[str, Any], twin: torch.nn.Module, shadow_storages: set[int]
) -> Iterator[Attribute]:
    for name in sorted((initial.keys() | twin.__dict__.keys()) - {*REGISTRIES, *_RELOAD_MARKS}):
        before, now = initial.get(name), twin.__dict__.get(name)
        if before is now or _same_value(before, now):
            continue
        if name != _PACKED or not isinstance(now, FunctionType):
            raise NoShadow(f"a reload changes {type(layer).__name__}.{name}")
        if not now.__closure__ and getattr(before, "__code__", None) is now.__code__:
            continue  # made anew, the same: it computes from layer.weight
        for cell in now.__closure__ or ():
            _check_owned(layer, cell, shadow_storages)
        yield Attribute(layer, name, now)


def _same_value(before: Any, now: Any) -> bool:
    """Attention layers set their default scales anew."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        same_kind = (before.dtype, before.shape, before.device) == (now.dtype, now.shape, now.device)
        return same_kind and torch.equal(_as_bytes(before), _as_bytes(now))
    return type(before) is type(now) and isinstance(now, (bool, int, float, str)) and bool(before == now)


def _check_owned(layer: torch.nn.Module, cell: CellType, shadow_storages: set[int]) -> None:
    """What a packed layer's function captured must be its own: packed memory, or a number."""
    captured = cell.cell_contents
    if isinstance(captured, torch.Tensor):
        if captured.untyped_storage().data_ptr() not in shadow_storages:
            return
    elif type(captured).__name__ == "CPUDNNLGEMMHandler" or isinstance(captured, (bool, int, torch.dtype)):
        return
    raise NoShadow(f"the packed {type(layer).__name__} holds a {type(captured).__name__} that is not its own")
