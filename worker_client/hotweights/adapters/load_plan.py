"""The load plan: what the model's own loader does with a checkpoint, written down.

    load_weights(tensors without storage) --what it would copy--> Copy: (tensor, slice) -> (parameter, slice)

Recording changes nothing: whatever the loader does to a parameter is noted and not done, so it may run while the model
serves. What is no plain copy of a slice and no constant (added to, repacked) makes its parameter opaque: not for this
route.
A plan is a claim about another program, so it is proven before it is used: see `differing`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@dataclass
class LoadPlan:
    """Copies and fills in the loader's order; of each opaque parameter, what was done to it instead."""

    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)

    def differing(self, model: torch.nn.Module, image: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Parameters for which the plan with these tensors does not give what the model holds now, and why.

        Bits count: zeros of both signs differ, a NaN equals itself. With the image that is installed, whatever is not
        in the answer may be written by the plan.
        """
        live = dict(model.named_parameters(remove_duplicate=False))
        problems = dict(self.opaque)
        for copy in self.copies:
            if copy.parameter in problems:
                continue
            target = copy.put.of(live[copy.parameter].data)
            if not _same_bits(copy.take.of(image[copy.tensor]).to(target.dtype), target):
                problems[copy.parameter] = f"holds something else than {copy.tensor} gives"
        for fill in self.fills:
            target = fill.put.of(live[fill.parameter].data)
            if not _same_bits(torch.full_like(target, fill.value), target):
                problems.setdefault(fill.parameter, f"holds something else than its padding of {fill.value:g}")
        return problems


def record(model: Any, tensors: Mapping[str, torch.Tensor]) -> LoadPlan:
    """Runs `model.load_weights` on the shapes, strides and dtypes of a checkpoint's tensors.

    Raises NotRecorded, and what the loader raises for tensors that are not its model's.
    """
    recorder = _Recorder(model)
    try:
        with torch.no_grad(), recorder:
            model.load_weights(iter(list(recorder.sources(tensors))))
    except RuntimeError as error:  # as torch says that values are not there
        raise NotRecorded(f"the loader stopped: {error}") from error
    return recorder.plan


@dataclass(frozen=True)
class _Origin:
    """What a storage holds: a checkpoint tensor's elements from `offset` on, perhaps cast once."""

    tensor: str
    offset: int
    dtype: torch.dtype


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = LoadPlan()
        # By storage; a storage that is held here keeps its number.
        self._origins: dict[int, tuple[_Origin, torch.UntypedStorage]] = {}
        self._targets: dict[int, tuple[str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._targets.setdefault(_number(parameter), (name, parameter))

    def sources(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            source = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._note(source, _Origin(name, 0, tensor.dtype))
            yield name, source

    def _note(self, tensor: torch.Tensor, origin: _Origin) -> None:
        self._origins[_number(tensor)] = origin, tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owned = [tensor for tensor in _written(func, args, kwargs) if _number(tensor) in self._targets]
        if owned:
            return self._written_to(owned[0], func, args)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            kwargs = {**kwargs, "device": "meta"}
        result = func(*args, **kwargs)
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
        self._note(result, _Origin(origin.tensor, origin.offset + int(source.storage_offset()), origin.dtype))

    def _origin(self, tensor: torch.Tensor) -> _Origin | None:
        noted = self._origins.get(_number(tensor))
        return noted[0] if noted else None

    def _written_to(self, target: torch.Tensor, func: Any, args: Any) -> torch.Tensor:
        name, parameter = self._targets[_number(target)]
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
            yield from (item for item in _flat(value) if isinstance(item, torch.Tensor))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


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


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
