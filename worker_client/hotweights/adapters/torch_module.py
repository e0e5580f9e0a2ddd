"""Any torch module: its tensors replaced by those of a folder, all or nothing.

The caller sees to it that no forward pass runs meanwhile: a plain module has no scheduler that could be paused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.mapped import MappedImage, TensorSpec, check_specs, dtype_name
from hotweights.adapters.undo import Copies, Snapshot


def module_specs(module: torch.nn.Module) -> dict[str, TensorSpec]:
    """What an image for this module holds: its state dict."""
    return {name: TensorSpec(dtype_name(t.dtype), tuple(t.shape)) for name, t in module.state_dict().items()}


def install(module: torch.nn.Module, folder: Path, name_map: Mapping[str, str]) -> bytes:
    """Writes the image in `folder` into the live tensors and gives their fingerprint.

    Raises BadImage, Mismatch or OSError before anything is written; what is raised while writing leaves the module as
    it was.
    """
    image = MappedImage(folder, name_map)
    try:
        check_specs(image.specs, module_specs(module))
        copies, snapshot = Copies(module), Snapshot(module)
        try:
            _write(module, image)
        except BaseException:
            snapshot.put_back()
            copies.put_back()
            raise
        return fingerprint(module)
    finally:
        image.close()


@torch.no_grad()
def _write(module: torch.nn.Module, image: MappedImage) -> None:
    live = module.state_dict(keep_vars=True)
    for name, tensor in image:
        live[name].copy_(tensor)


def same_as_folder(module: torch.nn.Module, folder: Path, name_map: Mapping[str, str]) -> bool:
    """Whether every live tensor has, bit for bit, the bytes of the folder's."""
    image = MappedImage(folder, name_map)
    try:
        live = module.state_dict()
        return all(_same_bytes(live[name], tensor) for name, tensor in image)
    finally:
        image.close()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of equal bits: NaN equals itself, and 0.0 does not equal -0.0."""
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)
