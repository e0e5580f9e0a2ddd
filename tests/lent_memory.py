"""GPU memory that is host memory: for tests of who lends what to whom, on machines without a GPU. No CUDA is in it.

Handles are names of files, opened anew by whoever borrows, so that what was freed cannot be opened.
"""

import ctypes
import mmap
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hotweights.adapters.lent import LentImage
from hotweights.adapters.mapped import MappedImage
from hotweights.transports.cuda_ipc import HANDLE_BYTES, CudaError
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.worker_client.window.prepare import _plain

DEVICE = "GPU-00000000-0000-0000-0000-000000000000"


class Memory:
    """See cuda_ipc: what is lent and what is borrowed has this in common."""

    folder: Path

    def __init__(self, handle: bytes) -> None:
        self.handle = handle
        self._path = self.folder / handle.decode().strip()
        if not self._path.exists():
            raise CudaError("borrowing GPU memory", "CUDA_ERROR_INVALID_VALUE")
        with self._path.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 0)

    def read(self, offset: int, size: int) -> bytes:
        return self._mapped[offset : offset + size]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._mapped[offset : offset + len(data)] = data

    def as_array(self, offset: int, size: int) -> torch.Tensor:
        return torch.frombuffer(self._mapped, dtype=torch.uint8, offset=offset, count=size)

    def close(self) -> None:
        pass


class Lent(Memory):
    def __init__(self, ordinal: int, size: int) -> None:
        name = secrets.token_hex(8)
        (self.folder / name).write_bytes(bytes(size))
        super().__init__(name.encode().ljust(HANDLE_BYTES))
        self.ordinal = ordinal

    def copy(self, offset: int, source: int, size: int) -> None:
        self.write(offset, ctypes.string_at(source, size))

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class OnGpu:
    """A tensor that says that it lies on GPU 0."""

    is_cuda = True
    device = SimpleNamespace(index=0)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def detach(self) -> "OnGpu":
        return self

    def is_contiguous(self) -> bool:
        return True

    def contiguous(self) -> "OnGpu":
        return self

    def cpu(self) -> torch.Tensor:
        return self._tensor

    def data_ptr(self) -> int:
        return self._tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, free_bytes: Sequence[int] = (1 << 30,)) -> list[str]:
    """Publishers and agents lend this memory, and ranks borrow it and write like those on a device.

    The UUIDs of the GPUs, of which each has so much that is free.
    """
    Memory.folder = folder
    names = [f"{DEVICE[:-1]}{number}" for number in range(len(free_bytes))]
    driver: dict[str, Any] = {
        "Lent": Lent,
        "devices": lambda: {name: number for number, name in enumerate(names)},
        "synchronize": lambda ordinal: None,
        "free_bytes": free_bytes.__getitem__,
    }
    for name, double in driver.items():
        monkeypatch.setattr(f"hotweights.transports.cuda_ipc.{name}", double)
    monkeypatch.setattr("hotweights.adapters.lent.open_memory", lambda device, handle, reader: Memory(handle))
    monkeypatch.setattr("hotweights.adapters.update.is_on_host", lambda storage: False)
    return names


def read(borrowed: pb.BorrowImageResponse, folder: Path) -> dict[str, torch.Tensor]:
    """As a rank does."""
    memories = [_plain(told) for told in borrowed.memories]
    opened = LentImage(memories, time.monotonic() + borrowed.left_s, MappedImage(folder, {}), torch.device("cpu"))
    return {name: tensor.clone() for name, tensor in opened.tensors.items()}
