"""Any torch module: its tensors replaced by those of a folder, all or nothing, on whatever device they are.

    folder --mmap--> host memory --copy_--> live tensors --copy_--> host memory --BLAKE3--> fingerprint

Nothing but copies to and from the host runs on a device, so it works where a device lacks operations or types (MPS has
no float64). The device is idle before the first write and after the last. The caller sees to it that no forward pass
runs meanwhile: a plain module has no scheduler that could be paused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hotweights.adapters.bits import same_bits
from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.finite import check_finite as check_all_finite
from hotweights.adapters.mapped import MappedImage, Mismatch, TensorSpec, check_specs, dtype_name
from hotweights.adapters.undo import Snapshot


def module_specs(module: torch.nn.Module) -> dict[str, TensorSpec]:
    """What an image for this module holds: its state dict."""
    return {name: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for name, t in module.state_dict().items()}


def install(module: torch.nn.Module, folder: Path, name_map: Mapping[str, str], *, check_finite: bool = False) -> bytes:
    """Writes the image in `folder` into the live tensors and gives their fingerprint.

    Raises BadImage, Mismatch, NotFinite (with `check_finite`) or OSError before anything is written; what is raised
    while writing leaves the module as it was. Takes as much host memory as the module's tensors, meanwhile.
    """
    image = MappedImage(folder, name_map)
    try:
        check_specs(image.specs, module_specs(module))
        if check_finite:
            check_all_finite(image)
        devices = _devices(module)
        _synchronize(devices)
        before = _Before(module)
        try:
            _write(module, image)
            _synchronize(devices)
        except BaseException:
            before.put_back()
            _synchronize(devices)
            raise
        return fingerprint(module)
    finally:
        image.close()


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _devices(module: torch.nn.Module) -> set[torch.device]:
    """Those that are not the host. Raises Mismatch for tensors without memory."""
    for name, tensor in _tensors(module).items():
        if tensor.device.type == "meta":
            raise Mismatch(f"tensor {name} of the module is on the meta device: there is nothing to write into")
    return {tensor.device for tensor in _tensors(module).values()} - {torch.device("cpu")}


def _synchronize(devices: set[torch.device]) -> None:
    for device in devices:
        backend = getattr(torch, device.type)
        if device.type == "mps":  # takes no device: there is one
            backend.synchronize()
        else:
            backend.synchronize(device)


class _Before:
    """What the module held, copied to the host, and which tensor stood where."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._snapshot = Snapshot(module)
        self._held = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors(module).values()]

    @torch.no_grad()
    def put_back(self) -> None:
        self._snapshot.put_back()
        for tensor, values in self._held:
            tensor.copy_(values)


@torch.no_grad()
def _write(module: torch.nn.Module, image: MappedImage) -> None:
    live = module.state_dict(keep_vars=True)
    for name, tensor in image:
        on_host = live[name].device.type == "cpu"
        # A device is given ordinary memory: drivers may register what they read from, and that must not be a file's.
        live[name].copy_(tensor if on_host else tensor.clone())


def same_as_folder(module: torch.nn.Module, folder: Path, name_map: Mapping[str, str]) -> bool:
    """Whether every live tensor has, bit for bit, the bytes of the folder's."""
    image = MappedImage(folder, name_map)
    try:
        live = module.state_dict()
        return all(same_bits(live[name].cpu(), tensor) for name, tensor in image)
    finally:
        image.close()
