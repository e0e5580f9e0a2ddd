"""A device made of Python that knows one operation, the copy: what else runs on it fails by itself.

Run as a script it installs weights into a module on that device, well and with a failure half-way, and prints what
was done there in order. It stands for MPS, where operations and types are missing, on machines that have none; what
a real device does beyond that (its queues, its memory) it does not show.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

done: list[str] = []


class Backend(_DummyBackendModule):
    def synchronize(self, device: Any) -> None:
        done.append("idle")


# The values lie on the host, by the storage that torch believes in: aliases share both.
values: dict[int, torch.Tensor] = {}


def toy_tensor(host: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
    values[made.untyped_storage()._cdata] = host.clone()
    return made


def held(tensor: torch.Tensor) -> torch.Tensor:
    return values[tensor.untyped_storage()._cdata]


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if source.device.type == "toy":
        done.append("read")
        target.copy_(held(source))
    else:
        done.append("write")
        held(target).copy_(source)
    return target


def on_device(module: torch.nn.Module) -> list[torch.Tensor]:
    """Moves the parameters there, and keeps them: their storages are known by their addresses."""
    kept = []
    for layer in module.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                kept.append(toy_tensor(parameter.detach()))
                layer._parameters[name] = torch.nn.Parameter(kept[-1])
    return kept


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    from hotweights.adapters import torch_module

    _setup_privateuseone_for_python_backend("toy", Backend())
    torch.library.impl("aten::_copy_from", "privateuseone")(copy_from)
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2, dtype=torch.float64))
    wanted = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    save_file(wanted, folder / "model.safetensors")
    kept = on_device(module)
    before = [held(tensor).clone() for tensor in kept]

    write = torch_module._write

    def write_and_fail(*arguments: Any) -> None:
        write(*arguments)
        raise RuntimeError("half-way")

    setattr(torch_module, "_write", write_and_fail)  # noqa: B010 - mypy knows that one does not do this
    failed = ""
    try:
        torch_module.install(module, folder, {})
    except RuntimeError as error:
        failed = str(error)
    undone = failed == "half-way" and all(torch.equal(held(t), b) for t, b in zip(kept, before, strict=True))
    undoing = done.copy()
    done.clear()

    setattr(torch_module, "_write", write)  # noqa: B010
    fingerprint = torch_module.install(module, folder, {})
    installed = all(torch.equal(held(t), w) for t, w in zip(kept, wanted.values(), strict=True))
    doing = done.copy()
    same = torch_module.same_as_folder(module, folder, {})
    answer = {"undone": undone, "undoing": undoing, "installed": installed, "doing": doing, "same": same}
    print(json.dumps({**answer, "fingerprint": fingerprint.hex()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
