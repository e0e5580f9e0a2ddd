"""Weights into modules that are not in host memory.

CUDA and MPS are tested where they are. Everywhere a device made of Python shows that the code needs nothing of a
device but copies, and an idle one before the first write and after the last.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from hotweights.adapters.fingerprint import fingerprint  # noqa: E402
from hotweights.adapters.mapped import Mismatch  # noqa: E402
from hotweights.adapters.torch_module import same_as_folder  # noqa: E402
from hotweights.adapters.vllm_extension import HotweightsWorkerExtension  # noqa: E402

TOY = Path(__file__).parent / "toy_device.py"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and what was seen in a process of its own: a device is registered for a process's whole life."""
    folder = tmp_path_factory.mktemp("toy")
    done = subprocess.run(
        [sys.executable, str(TOY), str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    if "cannot import name" in done.stderr:
        pytest.skip("this torch cannot have devices made of Python")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_only_copies_run_on_a_device_and_it_is_idle_around_the_writes(toy: tuple[Path, dict[str, Any]]) -> None:
    _, seen = toy
    assert seen["installed"]
    assert seen["same"]
    before, during, after = ["idle", *["read"] * 4], ["write"] * 4, ["idle", *["read"] * 4]
    assert seen["doing"] == [*before, *during, *after]


def test_a_failure_half_way_is_undone_on_a_device(toy: tuple[Path, dict[str, Any]]) -> None:
    _, seen = toy
    assert seen["undone"]
    assert seen["undoing"][-5:] == [*["write"] * 4, "idle"]


def test_the_fingerprint_is_that_of_the_same_weights_on_the_host(toy: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = toy
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2, dtype=torch.float64))
    extension = HotweightsWorkerExtension()
    extension.bind_module(module)
    assert extension.apply_update(folder).fingerprint.hex() == seen["fingerprint"] == fingerprint(module).hex()


def test_a_module_without_memory_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    extension = HotweightsWorkerExtension()
    extension.bind_module(torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(Mismatch, match="tensor weight of the module is on the meta device"):
        extension.apply_update(tmp_path)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS here")),
    ],
)
def test_a_module_on_its_device_is_written_in_place_and_undone(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    from hotweights.adapters import torch_module

    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64)).to(device)
    wanted = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in module.state_dict().items()}
    save_file(wanted, tmp_path / "model.safetensors")
    extension = HotweightsWorkerExtension()
    extension.bind_module(module)
    before, addresses = fingerprint(module), [t.data_ptr() for t in module.state_dict().values()]
    with monkeypatch.context() as patch:
        patch.setattr(torch_module, "_synchronize", _fails_after_the_write())
        with pytest.raises(RuntimeError, match="half-way"):
            extension.apply_update(tmp_path)
    assert fingerprint(module) == before
    extension.apply_update(tmp_path)
    assert same_as_folder(module, tmp_path, {})
    assert [t.data_ptr() for t in module.state_dict().values()] == addresses


def _fails_after_the_write() -> Any:
    calls = iter((None, RuntimeError("half-way"), None))

    def synchronize(devices: Any) -> None:
        if (error := next(calls)) is not None:
            raise error

    return synchronize
