"""The proof of what is installed: one digest over the live tensors of a module.

BLAKE3 over the digests of every parameter and of every buffer that is no alias of one, sorted by name; each is BLAKE3
over (name, dtype, shape, bytes). On CPUs with AVX-512 or AMX vLLM packs linear layers into memory of C++ that Python
cannot read (`layer.cpu_linear`, often with an emptied `layer.weight`). What such a layer answers to a fixed probe of 8
rows goes into the digest instead. That shows a layer that was not loaded, was loaded from another version or in part;
it does not show every single flipped bit, since outputs are rounded.

Equal on two engines of the same machine, configuration and weights; the probe makes it differ between machines.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from blake3 import blake3

from hotweights.adapters.scratch import Scratch
from hotweights.adapters.undo import storage_bytes

PROBE_ROWS = 8


def fingerprint(module: torch.nn.Module, *, threads: int = blake3.AUTO) -> bytes:
    """The digest of 32 bytes. Runs packed layers: only between steps of the engine."""
    return combine(digest_tensors(module, threads=threads), Probe(module))


def combine(tensors: bytes, probe: "Probe") -> bytes:
    """The digest from its two parts."""
    return blake3(tensors + probe.digest()).digest()


def digest_tensors(module: torch.nn.Module, *, threads: int = blake3.AUTO) -> bytes:
    """The part that reads memory; may run beside a serving engine."""
    return combine_tensors(tensor_digests(module, threads=threads))


def tensor_digests(module: torch.nn.Module, *, threads: int = blake3.AUTO) -> dict[str, bytes]:
    """Of each of `live_tensors`."""
    found: dict[str, bytes] = {}
    scratch: Scratch | None = None
    for name, tensor in live_tensors(module):
        scratch = scratch or Scratch(tensor.device)
        found[name] = digest_tensor(name, tensor, threads=threads, scratch=scratch)
    return found


def combine_tensors(digests: Mapping[str, bytes]) -> bytes:
    """The part that reads memory, from the digest of each of `live_tensors`."""
    return blake3(b"".join(digests[name] for name in sorted(digests))).digest()


def digest_tensor(
    name: str, tensor: torch.Tensor, *, threads: int = blake3.AUTO, scratch: Scratch | None = None
) -> bytes:
    """Of one tensor under its name. What lies on a device is copied by way of `scratch`."""
    hasher = blake3(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode(), max_threads=threads)
    if tensor.numel():
        hasher.update(bytes_of(tensor, scratch))
    return hasher.digest()


def live_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that share no storage with one. Aliases appear once."""
    seen: set[int] = set()
    for name, parameter in module.named_parameters():
        seen.add(parameter.untyped_storage().data_ptr())
        yield name, parameter
    for name, buffer in module.named_buffers():
        if buffer.numel() == 0 or buffer.untyped_storage().data_ptr() not in seen:
            yield name, buffer


def bytes_of(tensor: torch.Tensor, scratch: Scratch | None = None) -> Any:
    """The tensor's bytes as something with a buffer; on the host, without a copy where it is there already.

    Those in `scratch` are good until something else is in it.
    """
    tensor = tensor.detach()
    if scratch is not None and tensor.device.type != "cpu" and tensor.is_contiguous():
        taken = storage_bytes(scratch.take(tensor.nbytes))
        taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)  # nothing but a copy runs on the device
        return taken.numpy()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def packed_layers(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """Layers that compute from packed memory: (name, layer, width of their input)."""
    for name, layer in sorted(module.named_modules()):
        if not is_packed(layer):
            continue
        width = _input_width(layer)
        if width:
            yield name, layer, width


def is_packed(layer: torch.nn.Module) -> bool:
    """Whether it computes from packed memory: what its function captured, of oneDNN or, with AMX, a tensor.

    A function that captured nothing uses `layer.weight`.
    """
    return getattr(layer.__dict__.get("cpu_linear"), "__closure__", None) is not None


def _input_width(layer: torch.nn.Module) -> int:
    """Columns of a linear layer's weight; 0 when it has none. An emptied weight is asked for at the loader."""
    weight = layer._parameters.get("weight")
    if weight is not None and weight.ndim == 2:
        return int(weight.shape[1])
    for attribute in ("input_size_per_partition", "input_size"):
        width = getattr(layer, attribute, 0)
        if width:
            return int(width)
    return 0


class Probe:
    """What the packed layers answer. Runs in slices, so that a serving engine waits for none of it for long."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._layers = list(packed_layers(module))
        self._inputs: dict[int, torch.Tensor] = {}
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self._asked: dict[str, tuple[object, bytes]] = {}

    def run(self, budget_s: float) -> bool:
        """Goes on for about `budget_s`; True when every layer was asked."""
        ends = time.perf_counter() + budget_s
        for name, layer, width in self._layers:
            if self._is_asked(name, layer):
                continue
            if time.perf_counter() > ends:
                return False
            self._ask(name, layer, width)
        return True

    def digest(self) -> bytes:
        """Of the answers; layers that were packed again since they were asked are asked again."""
        self.run(float("inf"))
        return blake3(b"".join(self._asked[name][1] for name, _, _ in self._layers)).digest()

    def _is_asked(self, name: str, layer: torch.nn.Module) -> bool:
        return name in self._asked and self._asked[name][0] is _linear(layer)

    @torch.no_grad()
    def _ask(self, name: str, layer: torch.nn.Module, width: int) -> None:
        linear = _linear(layer)
        answer = linear(self._input(width), layer._parameters.get("weight"), None)
        header = f"{name}\0{answer.dtype}\0{tuple(answer.shape)}\0".encode()
        self._asked[name] = linear, blake3(header).update(bytes_of(answer)).digest()

    def _input(self, width: int) -> torch.Tensor:
        """A fixed pattern in [-1, 1), not from a generator: torch's may change between its versions."""
        if width not in self._inputs:
            steps = torch.arange(PROBE_ROWS * width, dtype=torch.int64) * 2654435761 % (1 << 32)
            pattern = steps.to(torch.float64) / (1 << 31) - 1.0
            self._inputs[width] = pattern.reshape(PROBE_ROWS, width).to(self._dtype)
        return self._inputs[width]


class Proof:
    """A fingerprint in the making: the digest of the tensors is there, the probe goes on in slices."""

    def __init__(self, digest: bytes, probe: Probe) -> None:
        self.probe = probe
        self._digest = digest
        self.fingerprint = b""

    def run(self, budget_s: float) -> bool:
        """Goes on for about `budget_s`; True when the fingerprint is known."""
        if not self.fingerprint and self.probe.run(budget_s):
            self.fingerprint = combine(self._digest, self.probe)
        return bool(self.fingerprint)


def _linear(layer: torch.nn.Module) -> Any:
    """The function a layer computes with; another one each time it is packed."""
    return layer.__dict__["cpu_linear"]
