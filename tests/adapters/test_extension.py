"""HotweightsWorkerExtension as a plain object, on plain torch modules."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from hotweights.adapters.finite import NotFinite  # noqa: E402
from hotweights.adapters.mapped import BadImage, Mismatch  # noqa: E402
from hotweights.adapters.torch_module import same_as_folder  # noqa: E402
from hotweights.adapters.vllm_extension import HotweightsWorkerExtension, NotBound  # noqa: E402
from hotweights.wire.errors import Refused  # noqa: E402

REPO = Path(__file__).parents[2]


class Tower(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    """Tied weights, a buffer, a scalar and a tensor without values: what state dicts are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.brief = torch.nn.Parameter(torch.randn(4).to(torch.bfloat16))


def a_checkpoint(folder: Path, seed: int = 3, **changes: Any) -> Path:
    torch.manual_seed(seed)
    other = Tower()
    tensors = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    tensors["norm.num_batches_tracked"] += seed
    for name, change in changes.items():
        if change is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = change
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(1)
    return Tower()


@pytest.fixture
def extension(tower: Tower) -> HotweightsWorkerExtension:
    extension = HotweightsWorkerExtension()
    extension.bind_module(tower)
    return extension


def test_every_tensor_is_replaced_bit_for_bit_at_its_old_address(
    tower: Tower, extension: HotweightsWorkerExtension, tmp_path: Path
) -> None:
    addresses = {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()}
    extension.apply_update(a_checkpoint(tmp_path))
    assert same_as_folder(tower, tmp_path, {})
    assert {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()} == addresses


def test_the_same_weights_have_the_same_fingerprint_and_others_another(
    extension: HotweightsWorkerExtension, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    prints = [
        extension.apply_update(a_checkpoint(tmp_path / name, seed)).fingerprint
        for name, seed in (("a", 3), ("b", 4), ("c", 3))
    ]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"first__weight": None}, "first.weight"),
        ({"other": torch.zeros(2)}, "other"),
        ({"first__bias": torch.zeros(9)}, "first.bias"),
        ({"first__bias": torch.zeros(8, dtype=torch.float64)}, "first.bias"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(
    tower: Tower, extension: HotweightsWorkerExtension, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    with pytest.raises(Mismatch, match=name):
        extension.apply_update(a_checkpoint(tmp_path, **changes))
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())


def test_a_write_that_fails_half_way_is_undone(
    tower: Tower, extension: HotweightsWorkerExtension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotweights.adapters import torch_module

    def write_some(module: Tower, image: object) -> None:
        module.first.weight.data.zero_()
        module.first.bias.data = torch.ones(8)
        raise RuntimeError("half-way")

    before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    address = tower.first.bias.data_ptr()
    monkeypatch.setattr(torch_module, "_write", write_some)
    with pytest.raises(RuntimeError, match="half-way"):
        extension.apply_update(a_checkpoint(tmp_path))
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())
    assert tower.first.bias.data_ptr() == address


def test_weights_that_are_no_numbers_are_refused_where_that_is_asked_for(
    tower: Tower, extension: HotweightsWorkerExtension, tmp_path: Path
) -> None:
    before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    folder = a_checkpoint(tmp_path, brief=torch.tensor([1.0, float("nan"), float("inf"), 2.0], dtype=torch.bfloat16))
    with pytest.raises(NotFinite, match=r"in 1 tensors: brief has 2 of 4$"):
        extension.apply_update(folder, check_finite=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())
    extension.apply_update(folder)
    assert same_as_folder(tower, folder, {})


def test_a_name_map_renames(tower: Tower, tmp_path: Path) -> None:
    extension = HotweightsWorkerExtension(name_map={"one": "first.weight"})
    extension.bind_module(tower)
    extension.apply_update(a_checkpoint(tmp_path, first__weight=None, one=torch.full((8, 8), 0.5)))
    assert bool((tower.first.weight == 0.5).all())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "larger than the file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "larger than the file"),
        ((2).to_bytes(8, "little") + b"no", "not JSON"),
        ((2).to_bytes(8, "little") + b"{}", "no safetensors file with a tensor"),
    ],
    ids=["empty", "header", "json", "tensorless"],
)
def test_what_is_no_image_is_refused(
    extension: HotweightsWorkerExtension, tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadImage, match=says):
        extension.apply_update(tmp_path)


def test_without_a_module_or_a_coordinator_it_says_what_to_do(
    extension: HotweightsWorkerExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOTWEIGHTS_ENDPOINT", raising=False)
    monkeypatch.delenv("HOTWEIGHTS_COORD", raising=False)
    with pytest.raises(NotBound):
        HotweightsWorkerExtension().apply_update()
    with pytest.raises(Refused, match="HOTWEIGHTS_ENDPOINT"):
        extension.apply_update()


def test_importing_the_adapters_engines_see_loads_nothing_heavy() -> None:
    code = (
        "import sys; import hotweights.adapters.vllm_extension, hotweights.adapters.vllm_worker;"
        "heavy = {'torch', 'vllm', 'grpc', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_smoke_demo_needs_neither_coordinator_nor_agent() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "examples" / "vllm_smoke_demo.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Applied weights match expected: True" in done.stdout
    assert done.returncode == 0, done.stderr
