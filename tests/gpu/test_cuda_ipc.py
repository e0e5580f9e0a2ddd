"""Two processes and the memory of one real GPU."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hotweights.transports import cuda_ipc  # noqa: E402
from hotweights.transports.cuda_ipc import BLOCK_BYTES, Borrowed, CudaError, Lent  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
]

SIZE = 64 << 20
DEADLINE_S = 60.0


class Process:
    """A child that answers every line with one."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begun(*command: str) -> Process:
        started.append(Process(*command))
        return started[-1]

    yield begun
    for process in started:
        process.end()


@pytest.fixture
def lent() -> Iterator[Lent]:
    memory = Lent(0, SIZE)
    yield memory
    memory.close()


def fill(memory: Lent, value: int) -> None:
    torch.as_tensor(memory.as_array(0, memory.size), device="cuda").fill_(value)
    torch.cuda.synchronize()


def test_gpus_are_known_by_the_names_of_nvidia_smi() -> None:
    asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    found = cuda_ipc.devices()
    assert found
    assert all(name in asked.stdout for name in found)
    assert f"GPU-{torch.cuda.get_device_properties(0).uuid}" in found
    assert cuda_ipc.can_reach(0, 0)


def test_another_process_reads_what_is_lent_bit_for_bit(lent: Lent, start: Callable[..., Process]) -> None:
    fill(lent, 7)
    borrower = start("tests.gpu.borrower", lent.handle.hex())
    assert int(borrower.ask("open")) == lent.size == SIZE
    assert borrower.ask(f"same 0 {SIZE} 7") == "True"
    assert borrower.ask(f"same {SIZE - 16} 16 7") == "True"
    lent.write(SIZE - 1, b"\x09")
    assert borrower.ask(f"same 0 {SIZE} 7") == "False"
    assert borrower.ask(f"same {SIZE - 1} 1 9") == "True"
    assert borrower.ask("close") == "closed"


def test_what_lies_outside_is_not_read(lent: Lent, start: Callable[..., Process]) -> None:
    borrower = start("tests.gpu.borrower", lent.handle.hex())
    borrower.ask("open")
    assert borrower.ask(f"same {SIZE - 8} 16 0") == f"there are {SIZE} bytes of GPU memory"
    assert borrower.ask(f"same 0 {SIZE} 0") in ("True", "False"), "the GPU is usable all the same"
    with pytest.raises(CudaError, match="there are"):
        lent.read(SIZE, 1)


def test_little_memory_is_lent_without_its_neighbours() -> None:
    one, other = Lent(0, 1), Lent(0, 1)
    assert (one.size, other.size) == (BLOCK_BYTES, BLOCK_BYTES)
    assert one.handle != other.handle
    one.close()
    other.close()


def test_a_handle_of_memory_that_was_freed_opens_nothing(start: Callable[..., Process]) -> None:
    memory = Lent(0, SIZE)
    borrower = start("tests.gpu.borrower", memory.handle.hex())
    assert int(borrower.ask("open")) == SIZE
    borrower.ask("close")
    memory.close()
    assert borrower.ask("open").startswith("CUDA_ERROR")


def test_what_lies_where_freed_memory_was_is_told_apart_by_its_seal(start: Callable[..., Process]) -> None:
    """The driver may give the same handle again, for memory at the same address."""
    memory = Lent(0, SIZE)
    fill(memory, 1)
    borrower = start("tests.gpu.borrower", memory.handle.hex())
    memory.close()
    again = Lent(0, SIZE)
    fill(again, 2)
    opened = borrower.ask("open")
    assert opened.startswith("CUDA_ERROR") or borrower.ask("same 0 64 1") == "False"
    again.close()


def test_a_lender_that_frees_what_is_read_harms_no_reader(start: Callable[..., Process]) -> None:
    memory = Lent(0, SIZE)
    fill(memory, 5)
    borrower = start("tests.gpu.borrower", memory.handle.hex())
    borrower.ask("open")
    assert borrower.ask("copying 1") == "begun"
    memory.close()
    assert borrower.answer() == "ended"
    assert borrower.ask(f"same 0 {SIZE} 5") in ("True", "False")
    assert borrower.ask("close") == "closed"


def test_a_lender_that_is_killed_while_it_is_read_harms_no_reader(start: Callable[..., Process]) -> None:
    lender = start("tests.gpu.lender", str(SIZE), "3")
    handle = lender.answer()
    borrower = start("tests.gpu.borrower", handle)
    borrower.ask("open")
    assert borrower.ask(f"same 0 {SIZE} 3") == "True"
    assert borrower.ask("copying 2") == "begun"
    time.sleep(0.3)
    lender.end()
    assert borrower.answer() == "ended"
    assert borrower.ask(f"same 0 {SIZE} 3") in ("True", "False")
    assert borrower.ask("close") == "closed"
    assert borrower.ask("open").startswith("CUDA_ERROR")


def test_nonsense_is_no_handle() -> None:
    with pytest.raises(CudaError):
        Borrowed(0, bytes(64))
    with pytest.raises(CudaError, match="64 bytes"):
        Borrowed(0, b"short")
    assert torch.ones(3, device="cuda").sum() == 3


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        Lent(0, 1 << 50)


def test_nothing_leaks_over_a_thousand_updates(start: Callable[..., Process]) -> None:
    lender = start("tests.gpu.lender", str(SIZE), "3")
    handle = bytes.fromhex(lender.answer())
    mine = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    before: Any = None
    for count in range(1001):
        memory = Borrowed(0, handle)
        mine.copy_(torch.as_tensor(memory.as_array(0, SIZE), device="cuda"))
        torch.cuda.synchronize()
        memory.close()
        own = Lent(0, BLOCK_BYTES)
        own.close()
        if not count:
            before = cuda_ipc.free_bytes(0)
    assert cuda_ipc.free_bytes(0) >= before
    assert bool((mine == 3).all())


def test_memory_is_pinned_where_it_lies_and_one_that_cannot_be_spoils_no_kernel() -> None:
    memory = torch.ones(SIZE, dtype=torch.uint8)
    cuda_ipc.pin(0, memory.data_ptr(), SIZE)
    assert memory.is_pinned()
    with pytest.raises(CudaError, match="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        cuda_ipc.pin(0, memory.data_ptr(), SIZE)
    there = torch.empty_like(memory, device="cuda").copy_(memory, non_blocking=True)
    assert int((there + 1).sum()) == 2 * SIZE
    cuda_ipc.unpin(0, memory.data_ptr())
    assert not memory.is_pinned()
    with pytest.raises(CudaError, match="unpinning memory"):
        cuda_ipc.unpin(0, memory.data_ptr())
    assert int((there + 1).sum()) == 2 * SIZE
