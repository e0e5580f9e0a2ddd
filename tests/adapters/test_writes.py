"""Writes: exactly what differs, there and back, and proofs that tell."""

from collections.abc import Callable

import pytest
import torch

from hotweights.adapters.device_writes import DeviceElements, DeviceWhole, DeviceWrite, ReadBack, device_write
from hotweights.adapters.placed import Budget
from hotweights.adapters.writes import (
    INDEX_BYTES,
    LINE_BYTES,
    RUNS,
    Elements,
    Function,
    Reversed,
    Whole,
    Write,
    difference,
    host_write,
    proof_of,
)

SIZE = 16 * 1024
ON_DEVICE: dict[type, type] = {Elements: DeviceElements, Whole: DeviceWhole}
Change = Callable[[torch.Tensor], None]


def drawn(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(SIZE).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.view(torch.uint8).numpy())


def made(live: torch.Tensor, new: torch.Tensor, budget: int | None = None) -> Write | None:
    """As for host memory; with a `budget` as for a device's, which tests on this machine have on the host too."""
    found = difference(live.untyped_storage(), new.untyped_storage(), live.element_size())
    if found is None:
        return None
    if budget is None:
        return host_write(live.untyped_storage(), found, [(live, new)])
    copy = difference(live.clone().untyped_storage(), new.untyped_storage(), live.element_size())
    assert copy is not None
    return device_write(live.untyped_storage(), copy, Budget(budget))


def few(tensor: torch.Tensor) -> None:
    tensor[torch.randperm(SIZE)[: SIZE // 100]] += 1


def a_row(tensor: torch.Tensor) -> None:
    tensor[4096:4608] += 1


def a_quarter_in_pieces(tensor: torch.Tensor) -> None:
    tensor.view(-1, 64)[:, :16] += 1


def most(tensor: torch.Tensor) -> None:
    tensor += 1


def the_last(tensor: torch.Tensor) -> None:
    tensor[-1] += 1


@pytest.mark.parametrize(
    ("change", "kind"),
    [(few, Elements), (a_row, Elements), (a_quarter_in_pieces, Elements), (most, Whole), (the_last, Elements)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("budget", [None, 0, 1 << 30], ids=["host", "device, no budget", "device"])
def test_a_write_goes_there_and_back_bit_for_bit(
    change: Change, kind: type[Write], dtype: torch.dtype, budget: int | None
) -> None:
    live = drawn(dtype)
    before, new = live.clone(), live.clone()
    change(new)
    write = made(live, new, budget)
    assert write is not None
    assert isinstance(write, kind if budget is None else ON_DEVICE[kind])
    assert write.proof() == write.old_proof != write.new_proof
    for _ in range(2):
        write.write()
        assert bits(live) == bits(new)
        assert write.proof() == write.new_proof
        write.undo()
        assert bits(live) == bits(before)
        assert write.proof() == write.old_proof


def test_a_write_takes_no_more_bytes_than_it_must() -> None:
    live = drawn()
    for change, limit in ((few, SIZE // 100 * 2), (a_row, 512 * 2), (a_quarter_in_pieces, SIZE // 2), (the_last, 2)):
        new = live.clone()
        change(new)
        write = made(live, new)
        assert write is not None
        assert write.new_bytes <= limit


def test_what_is_equal_is_not_written() -> None:
    live = drawn()
    live[3] = float("nan")
    assert made(live, live.clone()) is None


@pytest.mark.parametrize(("was", "now"), [(0.0, -0.0), (float("nan"), float("inf"))])
def test_values_that_compare_equal_or_not_at_all_are_told_apart_by_their_bits(was: float, now: float) -> None:
    live = drawn()
    live[5] = was
    new = live.clone()
    new[5] = now
    write = made(live, new)
    assert write is not None
    write.write()
    assert bits(live) == bits(new)


@pytest.mark.parametrize("size", [1, 3, 7, 255, 4097])
def test_storages_of_any_length_are_written(size: int) -> None:
    live = torch.arange(size, dtype=torch.int16)
    new = live.clone()
    new[-1] += 1
    write = made(live, new)
    assert write is not None
    write.write()
    assert bits(live) == bits(new)


def test_a_storage_of_values_of_several_sizes_is_written_by_bytes() -> None:
    live, new = torch.zeros(1001, dtype=torch.uint8), torch.zeros(1001, dtype=torch.uint8)
    new[1000] = 9
    write = made(live, new)
    assert write is not None
    assert write.new_bytes == 1
    write.write()
    assert bits(live) == bits(new)


def test_a_proof_shows_what_was_not_written_and_what_was_spoilt() -> None:
    live = drawn()
    for change in (few, most):
        new = live.clone()
        change(new)
        changed = int((new != live).nonzero()[0])
        write = made(live, new)
        assert write is not None
        write.write()
        assert write.proof() == write.new_proof
        live[changed] += 2
        assert write.proof() != write.new_proof
        write.undo()


def test_the_proof_of_bytes_shows_each_flipped_bit_and_blocks_that_changed_places() -> None:
    block = 8192
    data = torch.randint(0, 256, (3 * block + 5,), dtype=torch.uint8)
    proof = proof_of(data)
    for at in (0, block - 1, block, 3 * block - 1, 3 * block, len(data) - 1):
        data[at] ^= 1
        assert proof_of(data) != proof, at
        data[at] ^= 1
    assert proof_of(data) == proof
    swapped = torch.cat([data[block : 2 * block], data[:block], data[2 * block :]])
    assert proof_of(swapped) != proof


def test_a_packed_layer_gets_its_function_and_its_old_one_back() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.__dict__["cpu_linear"] = old = lambda x: x
    write = Function(layer, "cpu_linear", lambda x: x + 1, old)
    assert write.proof() == write.old_proof
    write.write()
    assert write.proof() == write.new_proof
    layer.__dict__["cpu_linear"] = None
    assert write.proof() not in (write.old_proof, write.new_proof)
    write.undo()
    assert layer.__dict__["cpu_linear"] is old


def test_a_write_that_was_done_is_one_the_other_way_round() -> None:
    live = drawn()
    before, new = live.clone(), live.clone()
    few(new)
    write = made(live, new)
    assert write is not None
    write.write()
    back = Reversed(write)
    assert back.proof() == back.old_proof == write.new_proof
    back.write()
    assert bits(live) == bits(before)
    assert back.proof() == back.new_proof
    back.undo()
    assert bits(live) == bits(new)


def test_what_is_beyond_the_budget_stays_on_the_host_and_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(f"hotweights.adapters.device_writes.{name}", 1024)
    live = drawn()
    before, new = live.clone(), live.clone()
    few(new)
    budget = Budget(SIZE // 100 * 8)  # for the places
    found = difference(live.clone().untyped_storage(), new.untyped_storage(), 2)
    assert found is not None
    write = device_write(live.untyped_storage(), found, budget)
    assert budget.left_bytes < SIZE // 100 * 2
    write.write()
    assert bits(live) == bits(new)
    write.undo()
    assert bits(live) == bits(before)
    assert write.proof() == write.old_proof


@pytest.mark.parametrize("piece", [1024, 1 << 20], ids=["in pieces", "at once"])
def test_all_that_was_written_to_a_device_is_read_back_together_and_what_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("hotweights.adapters.device_writes.PIECE_BYTES", piece)
    monkeypatch.setattr("hotweights.adapters.device_writes.BLOCK_BYTES", 1024)
    changes = (most, few, a_row, the_last, most, few)
    lives = [drawn() if at else torch.arange(1001, dtype=torch.int16) for at in range(len(changes))]
    news = [live.clone() for live in lives]
    writes = []
    for live, new, change in zip(lives, news, changes, strict=True):
        change(new)
        write = made(live, new, 1 << 30)
        assert isinstance(write, DeviceWrite)
        writes.append(write)
    reader = ReadBack(writes)
    for write in writes:
        write.write()
    assert reader.differing(written=True) is None
    assert reader.differing(written=False) is not None
    for at, (live, new) in enumerate(zip(lives, news, strict=True)):
        place = int((new != drawn() if at else new != torch.arange(1001, dtype=torch.int16)).nonzero()[-1])
        live[place] += 1
        assert reader.differing(written=True) == at
        live[place] -= 1
    assert reader.differing(written=True) is None
    for write in writes:
        write.undo()
    assert reader.differing(written=False) is None
    assert reader.reversed().differing(written=True) is None
    writes[2].write()
    assert reader.reversed().differing(written=True) == 2


def cheapest(now: torch.Tensor, new: torch.Tensor) -> tuple[float, dict[int, list[int]]]:
    """What the cheapest way costs, and the places by the length of a run; all of it has length 0."""
    size, differs = now.element_size(), now != new
    places = {run: differs.view(-1, run).any(1).nonzero().flatten().tolist() for run in RUNS if not len(differs) % run}
    costs = {run: len(at) * (INDEX_BYTES + max(run * size, LINE_BYTES)) for run, at in places.items()}
    return min([*costs.values(), now.nbytes]), places


@pytest.mark.parametrize("seed", range(60))
def test_a_difference_is_the_cheapest_and_right(seed: int) -> None:
    torch.manual_seed(seed)
    dtype = (torch.uint8, torch.int16, torch.int32, torch.int64)[seed % 4]
    count = int(torch.randint(1, 5000, ())) if seed % 3 else int(torch.randint(1, 20, ())) * 256
    now = torch.randint(0, 100, (count,)).to(dtype)
    new = now.clone()
    for _ in range(int(torch.randint(1, 6, ()))):
        begin = int(torch.randint(0, count, ()))
        new[begin : begin + int(torch.randint(1, max(2, count // 4), ())) : int(torch.randint(1, 40, ()))] += 1
    found = difference(now.untyped_storage(), new.untyped_storage(), now.element_size())
    assert found is not None
    least, places = cheapest(now, new)
    assert torch.equal(torch.from_numpy(found.now), now)
    assert torch.equal(torch.from_numpy(found.to_be), new)
    if found.run:
        assert list(found.places) == places[found.run]
        assert len(found.places) * (INDEX_BYTES + max(found.run * now.element_size(), LINE_BYTES)) == least
    else:
        assert least == now.nbytes


@pytest.mark.parametrize("count", [1, 7, 8, 9, 255, 256, 4096])
def test_what_is_equal_has_no_difference(count: int) -> None:
    now = torch.arange(count, dtype=torch.int16)
    assert difference(now.untyped_storage(), now.clone().untyped_storage(), 2) is None
