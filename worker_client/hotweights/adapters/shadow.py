"""A shadow of live modules: twins over memory of their own, for vLLM's own reload to fill beside the engine.

What the reload changed in the shadow is read off: new bytes for live storages, and the functions of packed layers
(`layer.cpu_linear`), which own the memory they compute from. Modules in which anything else could change, or which
could lead the reload out of the shadow into the live model, have no shadow: `NoShadow` names why.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch

from hotweights.adapters.bits import same_bits
from hotweights.adapters.direct import is_of_backend_base, reached
from hotweights.adapters.experts import packed_experts
from hotweights.adapters.mapped import MappedImage
from hotweights.adapters.routes import layerwise_reload
from hotweights.adapters.twins import REGISTRIES, NoShadow, Twins

_PACKED = "cpu_linear"
_RELOAD_MARKS = {"_do_torchao_reload", "_original_do_torchao_reload"}  # the reload's own, on the model itself
_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


@dataclass(frozen=True)
class Repacked:
    """A new function for a live layer, `layer.cpu_linear`, over memory of its own."""

    layer: torch.nn.Module
    function: Any


class Shadow:
    """Of the modules `of` a live model; those share no memory with others. Raises NoShadow."""

    def __init__(self, live: torch.nn.Module, of: Collection[torch.nn.Module]) -> None:
        known = set(live.modules())
        for name, layer in live.named_modules():
            if layer in of:
                _survey(name, layer, known)
        self._of = of
        self._twins = Twins(live, lambda layer: layer in of)
        self.model = self._twins.model

    def reload(
        self,
        worker: Any,
        image: MappedImage,
        tensors: Collection[str] | None,
        *,
        whole: bool,
        must: Collection[torch.nn.Module],
    ) -> None:
        """By vLLM's layerwise reload, from these tensors of the image (None: all). `must` are the live modules' own.

        Raises NotWhole and what loaders raise.
        """
        twins = [twin for layer, twin in self._twins.of.items() if layer in self._of]
        loaded = [self._twins.of[layer] for layer in must if layer in self._of]
        layerwise_reload(worker, self.model, image, lambda count: None, twins, tensors, whole=whole, must=loaded)
        for twin in loaded:
            if (experts := packed_experts(twin)) is not None:
                experts.process_weights_after_loading(twin)

    def differing(self) -> str:
        """A tensor of which the live one holds something else; empty when there is none."""
        for layer, twin in self._twins.of.items():
            if layer in self._of:
                for live, new in _tensor_pairs(layer, twin):
                    if not same_bits(live, new):
                        return f"a tensor of {type(layer).__name__} of shape {list(live.shape)}"
        return ""

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """What the live storages are to hold, by their addresses; equal ones too. Raises NoShadow."""
        placed: dict[int, torch.UntypedStorage] = {}
        for layer, twin in self._twins.of.items():
            if layer not in self._of:
                continue
            for live, new in _tensor_pairs(layer, twin):
                if not live.numel():
                    continue
                of_live, of_new = live.untyped_storage(), new.untyped_storage()
                other = placed.setdefault(of_live.data_ptr(), of_new)
                if other.data_ptr() != of_new.data_ptr():
                    raise NoShadow(f"tensors of {type(layer).__name__} were tied and are not tied after a reload")
                if of_live.nbytes() != of_new.nbytes() or live.storage_offset() != new.storage_offset():
                    raise NoShadow(f"a reload moves tensors of {type(layer).__name__} to other memory")
        return placed

    def repacked(self) -> list[Repacked]:
        """The layers that compute from other memory now. Raises NoShadow when anything else changed."""
        own = {storage.data_ptr() for storage in self.storages().values()}
        found: list[Repacked] = []
        for layer, twin in self._twins.of.items():
            if layer in self._of:
                found += _changed_functions(layer, self._twins.initial[layer], twin, own)
        return found

    def forget(self) -> None:
        """Its memory goes with the last that was read off it."""
        self._twins.forget()


def _tensor_pairs(layer: torch.nn.Module, twin: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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


def beyond(live: torch.nn.Module, layers: Collection[torch.nn.Module]) -> dict[torch.nn.Module, str]:
    """Those of the layers that cannot be in a shadow, and why; with all that they are known to compute from."""
    known = set(live.modules())
    found: dict[torch.nn.Module, str] = {}
    for name, layer in live.named_modules():
        if layer in layers:
            try:
                _survey(name, layer, known)
            except NoShadow as error:
                found.update({part: str(error) for part in reached(layer) if part in layers})
    return found


def _survey(name: str, layer: torch.nn.Module, known: set[torch.nn.Module]) -> None:
    """Raises NoShadow unless vLLM's reload of this layer is known to stay within its own tensors."""
    from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer

    where = f"{name or 'the model'} ({type(layer).__name__})"
    method = getattr(layer, "quant_method", None)
    understood = type(method).__name__ in _METHODS or packed_experts(layer) is not None
    if method is not None and not understood:
        raise NoShadow(f"{where} has the method {type(method).__name__}")
    if is_deferred_attention_layer(layer):
        processing = getattr(type(layer), "process_weights_after_loading", None)
        of_impl = getattr(type(getattr(layer, "impl", None)), "process_weights_after_loading", None)
        # The base's does nothing; another could write into the impl, which the shadow shares with the live layer.
        if processing is not Attention.process_weights_after_loading or not is_of_backend_base(of_impl):
            raise NoShadow(f"{where} processes its weights in a way of its own")
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None and (tensor.device.type != "cpu" or isinstance(tensor, torch.nn.UninitializedParameter)):
            raise NoShadow(f"{where} has tensors that are not in host memory")
    for attribute, value in layer.__dict__.items():
        if attribute not in REGISTRIES and _leads_out(value, known):
            raise NoShadow(f"{where} leads out of the model through {attribute}")


def _leads_out(value: Any, known: set[torch.nn.Module], depth: int = 3) -> bool:
    """Whether a loader could walk from an attribute to live modules or parameters; those of the model have twins."""
    if isinstance(value, set):
        return any(isinstance(item, (torch.nn.Module, torch.nn.Parameter)) for item in value)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)) and depth:
        return any(_leads_out(item, known, depth - 1) for item in value)
    return isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.nn.Module) and value not in known)


def _changed_functions(
    layer: torch.nn.Module, initial: dict[str, Any], twin: torch.nn.Module, shadow_storages: set[int]
) -> Iterator[Repacked]:
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
        yield Repacked(layer, now)


def _same_value(before: Any, now: Any) -> bool:
    """Attention layers set their default scales anew."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        same_kind = (before.dtype, before.shape, before.device) == (now.dtype, now.shape, now.device)
        return same_kind and same_bits(before, now)
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
