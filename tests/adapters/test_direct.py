"""Which modules are written directly: only those of which nothing else is known to be made."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotweights.adapters.direct import split
from hotweights.adapters.mapped import MappedImage
from hotweights.adapters.plans import Plans
from hotweights.adapters.routes import NotReproduced, Reload

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


class Leaf(torch.nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape), requires_grad=False)


class Model(torch.nn.Module):
    """Four leaves, loaded by their names; `q` and `k` of a checkpoint are fused in `two`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = Leaf(6, 4), Leaf(6, 4), Leaf(4), Leaf(4)
        self.loads = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.loads += 1
        for name, tensor in weights:
            if name in ("q", "k"):
                self.two.weight.data.narrow(0, 3 * (name == "k"), 3).copy_(tensor)
            else:
                self.get_parameter(name).data.copy_(tensor)
        return set()


SHAPES = {"one.weight": (6, 4), "q": (3, 4), "k": (3, 4), "three.weight": (4,), "four.weight": (4,)}
ALL = {"one", "two", "three", "four"}


def an_image(folder: Path, **changes: Any) -> MappedImage:
    folder.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file({**tensors, **changes}, folder / "model.safetensors")
    return MappedImage(folder, {})


@pytest.fixture
def image(tmp_path: Path) -> MappedImage:
    return an_image(tmp_path / "v1")


@pytest.fixture
def model(image: MappedImage) -> Model:
    model = Model()
    model.load_weights(image)
    return model


def direct(model: Model, image: MappedImage) -> tuple[set[str], dict[str, str]]:
    plan = Plans().plan(model, image)
    assert plan is not None
    found = split(model, plan, plan.differing(model, image.tensors))
    names = {module: name for name, module in model.named_modules()}
    assert found.direct | found.rest == set(model.modules())
    return {names[module] for module in found.direct}, dict(found.reasons)


def test_plain_modules_are_all_direct(model: Model, image: MappedImage) -> None:
    assert direct(model, image) == (ALL, {})


def test_a_module_that_holds_something_else_than_its_plan_gives_is_not(model: Model, image: MappedImage) -> None:
    model.two.weight.data[5, 3] += 1
    found, reasons = direct(model, image)
    assert found == ALL - {"two"}
    assert reasons == {"two": "weight holds something else than k gives"}


def test_a_module_that_keeps_another_form_is_not(model: Model, image: MappedImage) -> None:
    plans = Plans()
    plan = plans.plan(model, image)
    assert plan is not None
    model.one.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    del model.three.weight
    assert plan.differing(model, image.tensors) == {
        "one.weight": "is kept in another form after loading",
        "three.weight": "is not kept after loading",
    }


def test_modules_that_share_memory_go_the_same_way(tmp_path: Path) -> None:
    tied = torch.randn(4)
    image, model = an_image(tmp_path / "v1", **{"three.weight": tied, "four.weight": tied.clone()}), Model()
    model.load_weights(image)
    model.four.weight = model.three.weight
    model.four.__dict__["kept"] = torch.ones(3)
    assert direct(model, image) == ({"one", "two"}, {"three": "it goes with four"})


def test_modules_that_are_made_from_one_tensor_go_the_same_way(tmp_path: Path) -> None:
    class Twice(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            tensors = dict(weights)
            tensors["four.weight"] = tensors["three.weight"]
            return super().load_weights(tensors.items())

    image, model = an_image(tmp_path / "v1"), Twice()
    model.load_weights(image)
    model.four.__dict__["packed"] = [torch.ones(4)]
    found, reasons = direct(model, image)
    assert found == {"one", "two"}
    assert reasons["three"] == "it goes with four"


class _Processes(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["friend"] = None

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        """As latent attention multiplies matrices of its parts together."""


def test_what_a_module_with_processing_of_its_own_computes_from_is_not(model: Model, image: MappedImage) -> None:
    attention = _Processes(torch.nn.Linear(1, 1))
    attention.inner = model.one
    attention.__dict__["friend"] = model.three
    model.attention = attention
    found, reasons = direct(model, image)
    assert found == {"two", "four"}
    assert "processes weights after loading" in reasons["one"]
    assert "processes weights after loading" in reasons["three"]


def test_experts_that_move_are_not(model: Model, image: MappedImage) -> None:
    model.two.__dict__["enable_eplb"] = True
    found, reasons = direct(model, image)
    assert found == ALL - {"two"}
    assert "moves its experts" in reasons["two"]


@pytest.mark.parametrize("attribute", ["closure", "default", "list", "dict", "tensor"])
def test_a_layer_that_computes_from_something_beside_its_parameters_is_not(
    model: Model, image: MappedImage, attribute: str
) -> None:
    kept = torch.ones(4)

    def captured(x: torch.Tensor) -> torch.Tensor:
        return x * kept

    held: Any = {
        "closure": captured,
        "default": lambda x, weight=kept: x * weight,
        "list": [(kept,)],
        "dict": {"a": kept},
        "tensor": kept,
    }[attribute]
    model.three.__dict__["kept"] = held
    assert direct(model, image)[0] == ALL - {"three"}


def test_a_view_of_what_is_written_is_not_something_beside_it(model: Model, image: MappedImage) -> None:
    model.one.__dict__["gate"] = [lambda x, weight=model.one.weight[:3]: x @ weight.t()]
    assert direct(model, image)[0] == ALL


def test_a_quantised_layer_is_not(model: Model, image: MappedImage) -> None:
    class Fp8LinearMethod:
        pass

    model.one.__dict__["quant_method"] = Fp8LinearMethod()
    found, reasons = direct(model, image)
    assert found == ALL - {"one"}
    assert "Fp8LinearMethod" in reasons["one"]


def test_an_attention_backend_that_keeps_tensors_is_looked_into(model: Model, image: MappedImage) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.impl = SimpleNamespace(sinks=torch.ones(4))

    model.three.attn = Attention()
    found, reasons = direct(model, image)
    assert found == ALL - {"three"}
    assert reasons == {"three": "three.attn keeps sinks beside it"}


def test_a_tied_module_that_no_loader_writes_goes_with_its_partner(tmp_path: Path) -> None:
    class Skips(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            return super().load_weights((name, tensor) for name, tensor in weights if name != "four.weight")

    image, model = an_image(tmp_path / "v1"), Skips()
    model.four = Leaf(4)
    model.three.weight = torch.nn.Parameter(model.four.weight.data, requires_grad=False)
    model.load_weights(image)
    assert direct(model, image) == (ALL, {})


@pytest.mark.parametrize("how", ["attribute", "parameter", "data", "from a parameter", "from nothing"])
def test_a_model_whose_loader_does_what_no_copy_tells_is_reloaded_whole(tmp_path: Path, how: str) -> None:
    class Does(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            super().load_weights(weights)
            if how == "attribute":
                self.two.absorbed = self.two.weight[:3] @ self.two.weight[3:].t()
            elif how == "parameter":
                self.two.weight = torch.nn.Parameter(self.two.weight * 2, requires_grad=False)
            elif how == "data":
                self.two.weight.data = self.two.weight.data.double()
            elif how == "from a parameter":
                self.four.weight.data.copy_(self.three.weight * 2)
            else:
                self.four.weight.data.copy_(torch.arange(4.0))
            return set()

    image, model = an_image(tmp_path / "v1"), Does()
    Model.load_weights(model, image)
    plan = Plans().plan(model, image)
    assert plan is not None
    found = split(model, plan, plan.differing(model, image.tensors))
    if how == "from a parameter":
        # Known to be made of that tensor: it and what is made of it are reloaded together.
        names = {module: name for name, module in model.named_modules()}
        assert {names[module] for module in found.direct} == {"one", "two"}
        assert set(found.tensors or ()) == {"three.weight", "four.weight"}
    else:
        assert (found.direct, found.tensors) == (frozenset(), None)
        assert {"absorbed", "weight"} & {*found.reasons["one"].replace(".", " ").split()}


# The plan: once, and as long as it holds.


def test_recording_leaves_the_model_alone_and_is_done_once_a_layout(model: Model, tmp_path: Path) -> None:
    one, two = an_image(tmp_path / "a"), an_image(tmp_path / "b")
    wider = an_image(tmp_path / "c", extra=torch.ones(1))
    before, loads = {name: p.clone() for name, p in model.named_parameters()}, model.loads
    plans = Plans()
    plan = plans.plan(model, one)
    assert plans.plan(model, two) is plan
    assert plans.plan(model, wider) is None, "its loader knows no such tensor"
    again = plans.plan(model, one)
    assert again is not plan
    assert again == plan
    model.one.weight = torch.nn.Parameter(model.one.weight.clone(), requires_grad=False)
    assert plans.plan(model, one) is not again, "another tensor stands there"
    assert model.loads == loads, "it ran on twins"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_plan_is_proven_with_the_image_that_is_installed(model: Model, image: MappedImage, tmp_path: Path) -> None:
    other, plans = an_image(tmp_path / "v2"), Plans()
    assert plans.split(model, other, None, b"v1").direct == frozenset()
    assert set(plans.split(model, other, None, b"v1").reasons.values()) == {
        "the version that is installed is not known here"
    }
    assert plans.split(model, other, an_image(tmp_path / "v3"), b"v1").direct == frozenset()


def test_a_proof_holds_for_what_was_written_by_the_plan_and_for_nothing_else(
    model: Model, image: MappedImage, tmp_path: Path
) -> None:
    plans = Plans()

    def count(serving: bytes, base: MappedImage | None = None) -> int:
        return len(plans.split(model, image, base, serving).direct)

    assert count(b"v1", image) == len(ALL)
    assert count(b"v1") == len(ALL), "it needs no image any longer"
    plans.written(b"v1", b"v2")
    assert count(b"v2") == len(ALL)
    plans.written(b"v2", b"")  # by a reload in the pause
    plans.written(b"", b"v4")
    assert count(b"v4") == 0
    plans.written(b"stranger", b"v5")
    assert count(b"v5") == 0


def test_a_loader_that_leads_to_what_serves_is_not_recorded(image: MappedImage) -> None:
    serving = SimpleNamespace(model=None)

    class Escapes(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            serving.model.one.weight.data.zero_()
            return set()

    model = serving.model = Escapes()
    before, plans = model.one.weight.clone(), Plans()
    assert plans.plan(model, image) is None
    assert torch.equal(model.one.weight, before)
    (reason,) = {*plans.split(model, image, image, b"v1").reasons.values()}
    assert "leads to tensors that serve" in reason


class UnquantizedLinearMethod:
    """By vLLM's name for it."""


@pytest.mark.parametrize("packs", [True, False])
def test_a_weight_that_something_else_took_is_not_reloaded(packs: bool) -> None:
    """As vLLM's latent attention takes it on a CPU with AMX; there a linear layer's own function has it otherwise."""
    packed, layer = torch.randn(6, 4), Leaf(0)
    layer.__dict__["quant_method"] = UnquantizedLinearMethod()
    layer.__dict__["cpu_linear"] = (lambda x: x @ packed) if packs else torch.nn.functional.linear
    model = torch.nn.Sequential(layer)
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))

    def reload() -> Reload:
        return Reload(worker, None, [layer], None, whole=True, must=[layer], base=None)  # type: ignore[arg-type]

    if packs:
        assert reload().is_undone()
    else:
        with pytest.raises(NotReproduced, match="something took the weight of a Leaf after it was loaded"):
            reload()


@pytest.mark.parametrize("packs", [True, False])
def test_a_layer_that_computes_from_a_packed_tensor_is_packed(model: Model, image: MappedImage, packs: bool) -> None:
    packed = torch.randn(6, 4)
    model.one.__dict__["cpu_linear"] = (lambda x: x @ packed) if packs else (lambda x: x)
    assert direct(model, image)[1] == ({"one": "its weights are packed for this CPU"} if packs else {})
