"""What a loader does, written down: on loaders of all the kinds that models have."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from hotweights.adapters.load_plan import NotRecorded, record

Tensors = dict[str, torch.Tensor]
Load = Callable[["Model", str, torch.Tensor], None]


class Model(torch.nn.Module):
    """One parameter, and a loader that is given each tensor."""

    def __init__(self, load: Load, shape: tuple[int, ...] = (6, 4), dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self._load(self, name, tensor)
        return {"weight"}


def whole(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor)


def fused(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.narrow(0, {"q": 0, "k": 3, "v": 5}[name], tensor.shape[0]).copy_(tensor)


def second_of_two_ranks(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor.chunk(2, dim=1)[1])


def turned(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor.t())


def cast_first(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor.to(torch.bfloat16)[2:])


def moved_first(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor.to(device="cpu", dtype=torch.bfloat16))


def assigned(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight[1:3] = tensor


BF16, F32 = torch.bfloat16, torch.float32
PLANNED = {
    "whole": (whole, {"w": (6, 4)}, BF16),
    "fused": (fused, {"v": (1, 4), "q": (3, 4), "k": (2, 4)}, BF16),
    "tensor parallel": (second_of_two_ranks, {"w": (6, 8)}, BF16),
    "transposed": (turned, {"w": (4, 6)}, BF16),
    "cast by the copy": (whole, {"w": (6, 4)}, F32),
    "cast before a slice": (cast_first, {"w": (8, 4)}, F32),
    "moved to the parameter's device": (moved_first, {"w": (6, 4)}, F32),
    "assigned by index": (assigned, {"w": (2, 4)}, BF16),
    "a value for all": (whole, {"w": ()}, F32),
}


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def replay(model: Model, plan: Any, image: Tensors) -> None:
    for copy in plan.copies:
        copy.put.of(model.get_parameter(copy.parameter).data).copy_(copy.take.of(image[copy.tensor]))


@pytest.mark.parametrize(("load", "shapes", "dtype"), PLANNED.values(), ids=PLANNED)
def test_the_plan_of_a_loader_writes_what_the_loader_writes(load: Load, shapes: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    one, two = drawn(shapes, dtype), drawn(shapes, dtype)
    model = Model(load)
    model.load_weights(one.items())
    before = model.weight.clone()
    plan = record(model, one)
    assert torch.equal(model.weight, before), "recording changes nothing"
    assert plan.opaque == {}
    assert plan.differing(model, one) == {}
    assert list(plan.differing(model, two)) == ["weight"]
    replay(model, plan, two)
    planned = model.weight.clone()
    model.weight.data.copy_(before)
    model.load_weights(two.items())
    assert torch.equal(model.weight, planned)


def test_a_tensor_that_begins_within_its_storage_is_taken_from_there() -> None:
    file = torch.randn(100).to(BF16)
    image = {"w": file[7:31].view(6, 4)}
    model = Model(whole)
    model.load_weights(image.items())
    assert record(model, image).differing(model, image) == {}


def added_to(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor + 1)


def scaled(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor)
    model.weight.data.mul_(2)


def rounded_twice(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor.to(torch.float16))


def gathered(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.weight.data.copy_(tensor[torch.tensor([5, 4, 3, 2, 1, 0])])


@pytest.mark.parametrize("load", [added_to, scaled, rounded_twice, gathered])
def test_what_is_more_than_a_copy_is_opaque_and_not_done(load: Load) -> None:
    image = drawn({"w": (6, 4)}, F32)
    model = Model(load)
    before = model.weight.clone()
    plan = record(model, image)
    assert torch.equal(model.weight, before)
    assert list(plan.opaque) == ["weight"]
    assert list(plan.differing(model, image)) == ["weight"]


def test_a_loader_that_looks_at_values_is_not_recorded() -> None:
    def looks(model: Model, name: str, tensor: torch.Tensor) -> None:
        if tensor.sum().item() > 0:
            model.weight.data.copy_(tensor)

    with pytest.raises(NotRecorded, match="the loader stopped"):
        record(Model(looks), drawn({"w": (6, 4)}, BF16))


def test_padding_is_part_of_the_plan() -> None:
    def padded(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.weight.data[:4].copy_(tensor)
        model.weight.data[4:].fill_(0)
        model.weight.data[6:].fill_(0)  # none is left to fill

    image = drawn({"w": (4, 4)}, BF16)
    model = Model(padded)
    model.load_weights(image.items())
    plan = record(model, image)
    assert (plan.opaque, len(plan.fills)) == ({}, 1)
    assert plan.differing(model, image) == {}
    model.weight.data[5, 1] = 1
    assert "padding" in plan.differing(model, image)["weight"]


def test_what_is_filled_over_later_is_not_proven() -> None:
    def cut(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.weight.data.copy_(tensor)
        model.weight.data[4:].zero_()

    image = drawn({"w": (6, 4)}, BF16)
    model = Model(cut)
    model.load_weights(image.items())
    assert list(record(model, image).differing(model, image)) == ["weight"]


def test_what_is_computed_on_after_loading_differs() -> None:
    image = drawn({"w": (6, 4)}, BF16)
    model = Model(whole)
    model.load_weights(image.items())
    model.weight.data[0, 0] += 1
    assert "w" in record(model, image).differing(model, image)["weight"]


def test_a_tied_parameter_is_written_once_under_its_first_name() -> None:
    class Tied(Model):
        def __init__(self) -> None:
            super().__init__(whole)
            self.head = self.weight

    image = drawn({"w": (6, 4)}, BF16)
    model = Tied()
    assert [copy.parameter for copy in record(model, image).copies] == ["weight"]


def test_zeros_of_both_signs_differ_and_a_nan_equals_itself() -> None:
    image = {"w": torch.zeros(6, 4).to(BF16)}
    image["w"][0, 0] = float("nan")
    model = Model(whole)
    model.load_weights(image.items())
    plan = record(model, image)
    assert plan.differing(model, image) == {}
    model.weight.data[1, 1] = -0.0
    assert list(plan.differing(model, image)) == ["weight"]
