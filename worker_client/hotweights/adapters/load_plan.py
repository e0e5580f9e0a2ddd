"""The load plan: what the model's own loader does with a checkpoint, written down.

    load_weights(tensors without storage) --what it would copy--> Copy: (tensor, slice) -> (parameter, slice)

Recording changes nothing: the loader runs on twins of the model's modules, and whatever it does to a parameter is
noted and not done, so it may run while the model serves. What is no plain copy of a slice and no constant (added to,
repacked) makes its parameter opaque: not for this route.
A plan is a claim about another program, so it is proven before it is used: see `differing`.
"Parameters" here are buffers too.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hotweights.adapters.bits import same_bits
from hotweights.adapters.components import DRAFT, Together
from hotweights.adapters.twins import REGISTRIES, NoShadow, Twins

PIECE_BYTES = 64 << 20
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class NotRecorded(Exception):
    """The loader cannot run without the tensors' values; the text says where it stopped."""


@dataclass(frozen=True)
class Slice:
    """Some elements of a tensor: shape, strides and offset, in elements from the tensor's first."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view. The tensor may begin anywhere in its storage."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Copy:
    """`parameter[put] = tensor[take]`, cast to the parameter's dtype."""

    tensor: str
    take: Slice
    parameter: str
    put: Slice


@dataclass(frozen=True)
class Fill:
    """`parameter[put] = value`, whatever the checkpoint holds: vocabularies are padded so."""

    parameter: str
    put: Slice
    value: float


@dataclass(frozen=True)
class Form:
    """How a tensor lies in memory, strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def form(tensor: torch.Tensor) -> Form:
    """Of this tensor."""
    return Form(tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass
class LoadPlan:
    """Copies and fills in the loader's order; of each opaque parameter, what was done to it instead."""

    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    """Of every parameter that the loader writes: the form that it wrote to."""
    sources: dict[str, set[str]] = field(default_factory=dict)
    """The checkpoint tensors that each parameter is made from."""
    unclear: dict[str, str] = field(default_factory=dict)
    """What the loader did that no copy tells, by module: such a model is not split, all of it is reloaded."""
    shared: list[tuple[Copy, Copy]] = field(default_factory=list)
    """Copies of a draft, which are not made, for its target has the same place; with the target's."""
    left_out: frozenset[str] = frozenset()
    """The tensors of a draft that go nowhere else. See `Together`."""

    def differing(self, model: torch.nn.Module, image: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Parameters for which the plan with these tensors does not give what the model holds now, and why.

        Bits count: zeros of both signs differ, a NaN equals itself. With the image that is installed, whatever is not
        in the answer may be written by the plan. Reads the model where it is; a device's tensors are compared there.
        """
        live = named_tensors(model)
        problems = {**self.opaque, **self.reshaped(live)}
        for copy in self.copies:
            if copy.parameter in problems:
                continue
            target = copy.put.of(live[copy.parameter].data)
            if not _holds(target, copy.take.of(image[copy.tensor])):
                problems[copy.parameter] = f"holds something else than {copy.tensor} gives"
        for fill in self.fills:
            if fill.parameter in problems:
                continue
            target = fill.put.of(live[fill.parameter].data)
            if not same_bits(torch.full_like(target, fill.value), target):
                problems[fill.parameter] = f"holds something else than its padding of {fill.value:g}"
        return problems

    def disagreeing(self, image: Mapping[str, torch.Tensor]) -> str:
        """A tensor of the draft that has something else for a shared place than the target has; empty without one."""
        for of_draft, of_target in self.shared:
            one, other = (copy.take.of(image[copy.tensor]) for copy in (of_draft, of_target))
            if one.dtype != other.dtype or not same_bits(one, other):
                return of_draft.tensor
        return ""

    def reshaped(self, live: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Parameters that the model does not hold in the form that its loader writes."""
        problems: dict[str, str] = {}
        for name, written in self.forms.items():
            if name not in live:
                problems[name] = "is not kept after loading"
            elif form(live[name]) != written:
                problems[name] = "is kept in another form after loading"
        return problems

    def tensors_for(self, parameters: Collection[str]) -> set[str]:
        """The checkpoint tensors that these parameters are made from."""
        return {tensor for name in parameters for tensor in self.sources.get(name, ())}


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def record_beside(live: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> LoadPlan:
    """The plan of a model that serves: its loader runs on twins. Raises NotRecorded."""
    try:
        twins = Twins(live, lambda layer: False)
    except NoShadow as error:
        raise NotRecorded(str(error)) from error
    try:
        twins.as_created()
        names = {layer: name for name, layer in live.named_modules()}
        before = {twin: _state(twin) for twin in twins.of.values()}
        serving = {_number(tensor) for tensor in named_tensors(live).values()}
        if isinstance(twins.model, Together):
            plan = _record_together(twins.model, tensors, serving)
        else:
            plan = record(twins.model, tensors, serving)
        for layer, twin in twins.of.items():
            for attribute, now in _state(twin).items():
                if before[twin].get(attribute) != now:
                    plan.unclear.setdefault(names[layer], f"the loader makes or replaces its {attribute}")
        return plan
    finally:
        twins.forget()


def _state(twin: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Which tensors, over which storages, stand in each attribute; registered ones by their own names."""
    registered = {**twin._parameters, **twin._buffers}
    others = {name: value for name, value in twin.__dict__.items() if name not in REGISTRIES}
    return {
        name: tuple((id(tensor), _number(tensor)) for tensor in _tensors(value))
        for name, value in (*registered.items(), *others.items())
    }


def _record_together(model: Together, tensors: Mapping[str, torch.Tensor], untouchable: Collection[int]) -> LoadPlan:
    """The plans of target and draft as one; where both write to the same tensor it is the target that does.

    Raises NotRecorded where the draft does not write there what the target writes, place for place.
    """
    of_target = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{DRAFT}/")}
    of_draft = {name: tensor for name, tensor in tensors.items() if model.of_draft(name)}
    target = record(model, of_target, untouchable, model.load_target)
    draft = record(model, of_draft, untouchable, model.load_draft)
    places = {(copy.parameter, copy.put): copy for copy in target.copies}
    shared: list[tuple[Copy, Copy]] = []
    for parameter in sorted(draft.forms.keys() & target.forms.keys()):
        repeated = [copy for copy in draft.copies if copy.parameter == parameter]
        if parameter in draft.opaque or any((parameter, copy.put) not in places for copy in repeated):
            raise NotRecorded(f"target and draft share {parameter}, and load it in ways of their own")
        shared += [(copy, places[parameter, copy.put]) for copy in repeated]
        del draft.forms[parameter]
    left_out = frozenset(copy.tensor for copy, _ in shared)
    if used := sorted(left_out & draft.tensors_for(draft.forms)):
        raise NotRecorded(f"the draft shares with its target what it loads from {used[0]}, and keeps some of it")
    return LoadPlan(
        copies=target.copies + [copy for copy in draft.copies if copy.parameter in draft.forms],
        fills=target.fills + [fill for fill in draft.fills if fill.parameter in draft.forms],
        opaque={**draft.opaque, **target.opaque},
        forms={**draft.forms, **target.forms},
        sources={**draft.sources, **target.sources},
        unclear={**draft.unclear, **target.unclear},
        shared=shared,
        left_out=left_out,
    )


def record(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    untouchable: Collection[int] = (),
    load: Callable[[Iterator[tuple[str, torch.Tensor]]], Any] | None = None,
) -> LoadPlan:
    """Runs `model.load_weights`, or `load`, on the shapes, strides and dtypes of a checkpoint's tensors.

    `untouchable` storages, by number, are not to be written to. Raises NotRecorded.
    """
    recorder = _Recorder(model, untouchable)
    try:
        with torch.no_grad(), recorder:
            (load or model.load_weights)(iter(list(recorder.sources(tensors))))
    except NotRecorded:
        raise
    except Exception as error:  # a loader raises what it likes for tensors that are not its model's or have no values
        raise NotRecorded(f"the loader stopped: {type(error).__name__}: {error}") from error
    return recorder.plan


@dataclass(frozen=True)
class _Origin:
    """What a storage holds: a checkpoint tensor's elements from `offset` on, perhaps cast once."""

    tensor: str
    offset: int
    dtype: torch.dtype


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: torch.nn.Module, untouchable: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = LoadPlan()
        self._untouchable = untouchable
        # By storage; a storage that is held here keeps its number.
        self._origins: dict[int, _Origin] = {}
        self._makings: dict[int, set[str]] = {}
        self._held: list[torch.UntypedStorage] = []
        self._targets: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in named_tensors(model).items():
            self._targets.setdefault(_number(tensor), (name, tensor))

    def sources(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            source = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._origins[_number(source)] = _Origin(name, 0, tensor.dtype)
            self._made(source, {name})
            yield name, source

    def _made(self, tensor: torch.Tensor, of: set[str]) -> None:
        self._held.append(tensor.untyped_storage())
        self._makings.setdefault(_number(tensor), set()).update(of)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = list(_written(func, args, kwargs))
        if any(_number(tensor) in self._untouchable for tensor in written):
            raise NotRecorded(f"the loader leads to tensors that serve and writes to them by {func}")
        targets = {_number(tensor) for tensor in written}
        makings = {
            name
            for tensor in _tensors((args, kwargs))
            if _number(tensor) not in targets
            for name in self._makings.get(_number(tensor), ())
        }
        owned = [tensor for tensor in written if _number(tensor) in self._targets]
        if len(owned) > 1:
            raise NotRecorded(f"the loader writes to several parameters at once, by {func}")
        if owned:
            return self._written_to(owned[0], func, args, makings)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            kwargs = {**kwargs, "device": "meta"}
        result = func(*args, **kwargs)
        if makings:
            for tensor in (*_tensors(result), *written):
                self._made(tensor, makings)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self._copied(args[0], result)
        return result

    def _copied(self, source: torch.Tensor, result: torch.Tensor) -> None:
        """A copy with the same strides has the same elements in the same order, from its own beginning."""
        origin = self._origin(source)
        if origin is None or result.stride() != source.stride() or not _is_dense(source):
            return
        if source.dtype not in (origin.dtype, result.dtype):
            return  # rounded twice
        offset = origin.offset + int(source.storage_offset())
        self._origins[_number(result)] = _Origin(origin.tensor, offset, origin.dtype)

    def _origin(self, tensor: torch.Tensor) -> _Origin | None:
        return self._origins.get(_number(tensor))

    def _written_to(self, target: torch.Tensor, func: Any, args: Any, makings: set[str]) -> torch.Tensor:
        name, parameter = self._targets[_number(target)]
        self.plan.forms[name] = form(parameter)
        self.plan.sources.setdefault(name, set()).update(makings)
        self._made(target, self.plan.sources[name])  # for what is computed from it
        if not target.numel():
            return target
        put = Slice(tuple(target.shape), target.stride(), int(target.storage_offset() - parameter.storage_offset()))
        if func in _FILLS:
            self.plan.fills.append(Fill(name, put, float(args[1]) if len(args) > 1 else 0.0))
            return target
        source = args[1] if func is torch.ops.aten.copy_.default else None
        origin = self._origin(source) if isinstance(source, torch.Tensor) else None
        if source is None or origin is None:
            self.plan.opaque.setdefault(name, f"the loader writes it by {func} with something it computed")
            if not makings and (source is not None or not self.plan.sources[name]):
                self.plan.unclear.setdefault(name.rpartition(".")[0], f"the loader computes {name} from nothing known")
        elif source.dtype not in (origin.dtype, target.dtype):
            self.plan.opaque.setdefault(name, f"the loader casts {origin.tensor} to {source.dtype} on the way")
        else:
            seen = source.expand(target.shape)
            take = Slice(tuple(seen.shape), seen.stride(), origin.offset + int(seen.storage_offset()))
            self.plan.copies.append(Copy(origin.tensor, take, name, put))
        return target


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator changes in place."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)


def _number(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, each once, in whatever order."""
    places = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    step = 1
    for stride, size in places:
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def _holds(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether it has the source's values, cast; a device is given them in pieces, beside what it serves."""
    rows = max(1, PIECE_BYTES * len(target) // max(1, target.nbytes)) if target.ndim else 1
    pieces = (
        zip(torch.split(target, rows), torch.split(source, rows), strict=True) if target.ndim else [(target, source)]
    )
    return all(same_bits(values.to(there.dtype).to(there.device), there) for there, values in pieces)
