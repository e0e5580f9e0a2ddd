"""Which modules of a model may be written directly by its load plan; of each other one, why not.

A module is written directly when the plan, with the version that is installed, gives every byte it holds (see
`LoadPlan.differing`), and when nothing else is known to have been made from those bytes: packed or quantised weights,
tensors that a layer keeps beside its parameters, matrices that an attention layer multiplied together after loading.
Modules that share memory, or a checkpoint tensor, go the same way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from hotweights.adapters.fingerprint import is_packed
from hotweights.adapters.load_plan import LoadPlan, named_tensors
from hotweights.adapters.twins import REGISTRIES
from hotweights.adapters.undo import storages_of

# vLLM's methods that leave weights as they were loaded, or else change the parameter itself, which the proof sees.
_PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
# Attention that hands its processing on to its backend, whose base does nothing.
_PLAIN_PROCESSING = {"Attention.process_weights_after_loading", "MMEncoderAttention.process_weights_after_loading"}


@dataclass(frozen=True)
class Split:
    """A model's modules by their route."""

    direct: frozenset[torch.nn.Module]
    rest: frozenset[torch.nn.Module]
    """All others, those without tensors too."""
    reasons: Mapping[str, str]
    """Of the rest that loaders write: by name, why they are not direct."""
    tensors: frozenset[str] | None
    """The checkpoint tensors that the rest is made from; None where that is not known, and all are given to it."""


def nothing_direct(model: torch.nn.Module, plan: LoadPlan | None, reason: str) -> Split:
    """For when nothing is known of a model, or nothing is wanted of what is known; with a plan, who is written."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in (plan.forms if plan else _owners(model)))
    return Split(frozenset(), frozenset(model.modules()), dict.fromkeys(names, reason), None)


def split(model: torch.nn.Module, plan: LoadPlan, differing: Mapping[str, str]) -> Split:
    """By a plan that was tried: `differing` are the parameters for which it does not hold, and why."""
    if plan.unclear:
        name, why = next(iter(plan.unclear.items()))
        return nothing_direct(model, plan, f"{name or 'the model'}: {why}")
    modules = dict(model.named_modules(remove_duplicate=False))
    out: dict[torch.nn.Module, str] = {}
    for name, module in modules.items():
        if why := _processing(module):
            for part in reached(module):
                out.setdefault(part, f"{name} {why}")
    serving = {tensor.untyped_storage().data_ptr() for tensor in named_tensors(model).values()}
    for name, module in modules.items():
        # What an attention backend keeps is of the module around it: sinks.
        if kept := next(_strangers(vars(module.impl) if hasattr(module, "impl") else {}, serving), ""):
            out.setdefault(modules[name.rpartition(".")[0]], f"{name} keeps {kept} beside it")
    for module in {module: None for module, _ in _owners(model).values()}:
        # Those too that no loader writes: they may share the memory of one that is written.
        if module not in out and (why := _kept_beside(module, serving)):
            out[module] = why
    written = {name: modules[name.rpartition(".")[0]] for name in plan.forms}
    for name, module in written.items():
        if name in differing:
            out.setdefault(module, f"{name.rpartition('.')[2]} {differing[name]}")
    spread(model, plan, out)
    direct = frozenset(_with_partners(model, {module for module in written.values() if module not in out}))
    rest = {name: module for name, module in written.items() if module in out}
    return Split(
        direct=direct,
        rest=frozenset(modules.values()) - direct,
        reasons={name.rpartition(".")[0]: out[module] for name, module in rest.items()},
        tensors=frozenset(plan.tensors_for(rest)),
    )


def spread(model: torch.nn.Module, plan: LoadPlan, out: dict[torch.nn.Module, str]) -> None:
    """To modules that share memory or a checkpoint tensor with one that is out."""
    names = {module: name for name, module in model.named_modules()}
    groups: dict[Any, set[torch.nn.Module]] = {}
    for name, (module, tensor) in _owners(model).items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), set()).add(module)
        for source in plan.sources.get(name, ()):
            groups.setdefault(source, set()).add(module)
    grew = True
    while grew:
        grew = False
        for group in groups.values():
            outside = next((module for module in group if module in out), None)
            for module in group if outside is not None else ():
                if module not in out:
                    out[module] = f"it goes with {names[outside]}"
                    grew = True


def _with_partners(model: torch.nn.Module, direct: set[torch.nn.Module]) -> set[torch.nn.Module]:
    """With the modules, which no loader writes, that hold the same memory: a tied head."""
    memory = storages_of(direct)
    return direct | {
        module
        for module, tensor in _owners(model).values()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in memory
    }


def _owners(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: (modules[name.rpartition(".")[0]], tensor) for name, tensor in named_tensors(model).items()}


def _processing(module: torch.nn.Module) -> str:
    """Why what is loaded into this module and its parts is not all that it computes from; or empty."""
    process = getattr(type(module), "process_weights_after_loading", None)
    of_backend = getattr(type(getattr(module, "impl", None)), "process_weights_after_loading", None)
    plain = getattr(process, "__qualname__", "") in _PLAIN_PROCESSING and is_of_backend_base(of_backend)
    if process is not None and not plain:
        return f"({type(module).__name__}) processes weights after loading"
    if getattr(module, "enable_eplb", False):
        return f"({type(module).__name__}) moves its experts"
    return ""


def is_of_backend_base(function: Any) -> bool:
    """Whether an attention backend has no processing of its own."""
    return function is None or getattr(function, "__qualname__", "").startswith("AttentionImplBase.")


def reached(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """It, its parts, and the modules that it holds otherwise."""
    yield from module.modules()
    for value in module.__dict__.values():
        if isinstance(value, torch.nn.Module):
            yield from value.modules()


def _kept_beside(module: torch.nn.Module, serving: set[int]) -> str:
    """What a module computes from beside its registered tensors; empty when that is nothing."""
    method = getattr(module, "quant_method", None)
    if method is not None and type(method).__name__ not in _PLAIN_METHODS:
        return f"its weights are processed by {type(method).__name__}"
    own = {name: value for name, value in module.__dict__.items() if name not in REGISTRIES}
    if is_packed(module) or any(not isinstance(thing, torch.Tensor) for thing in _held(own)):
        return "its weights are packed for this CPU"
    kept = next(_strangers(own, serving), "")
    return f"it keeps {kept} beside its parameters" if kept else ""


def _strangers(attributes: Mapping[str, Any], serving: set[int]) -> Iterator[str]:
    """Names of the attributes that hold tensors other than those that serve."""
    for name, value in attributes.items():
        tensors = (thing for thing in _held(value) if isinstance(thing, torch.Tensor) and thing.numel())
        if any(tensor.untyped_storage().data_ptr() not in serving for tensor in tensors):
            yield name


def _held(value: Any, depth: int = 4) -> Iterator[Any]:
    """Tensors, and packed memory, in an attribute: in containers, and in what functions have captured."""
    if isinstance(value, torch.Tensor) or type(value).__name__ == "CPUDNNLGEMMHandler":
        yield value
        return
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        value = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, (list, tuple, set)) and depth:
        for item in value:
            yield from _held(item, depth - 1)
