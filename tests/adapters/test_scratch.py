"""Host memory that one storage after the other passes through, and comparing bit for bit."""

import pytest
import torch

from hotweights.adapters.bits import same_bits
from hotweights.adapters.scratch import Scratch
from hotweights.adapters.undo import storage_bytes
from hotweights.adapters.views import are_all

CPU = torch.device("cpu")


def test_a_storage_is_copied_whole_and_as_large_as_it_is() -> None:
    scratch = Scratch(CPU)
    for size in (100, 7, 1000):
        source = torch.randint(0, 255, (size,), dtype=torch.uint8)
        taken = scratch.copy(source.untyped_storage())
        assert taken.nbytes() == size
        assert torch.equal(storage_bytes(taken), source)


def test_what_fits_takes_no_memory_anew() -> None:
    scratch = Scratch(CPU)
    places = [scratch.take(size).data_ptr() for size in (1000, 10, 1000)]
    assert len(set(places)) == 1


def test_what_was_taken_lives_on_when_more_is_needed() -> None:
    scratch = Scratch(CPU)
    source = torch.arange(100, dtype=torch.uint8)
    taken = scratch.copy(source.untyped_storage())
    storage_bytes(scratch.take(1 << 20)).fill_(7)
    del scratch
    assert torch.equal(storage_bytes(taken), source)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_equal_bits_are_equal_and_every_other_bit_is_seen(count: int, dtype: torch.dtype) -> None:
    one = torch.randint(0, 255, (count * dtype.itemsize,), dtype=torch.uint8)
    other = one.clone()
    assert same_bits(one.view(dtype), other.view(dtype))
    for at in {0, len(one) // 2, len(one) - 1} if count else ():
        other[at] ^= 1
        assert not same_bits(one.view(dtype), other.view(dtype))
        other[at] ^= 1


def test_bits_count_and_not_values() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_it_does_not_matter_where_in_memory_they_lie() -> None:
    data = torch.randint(0, 255, (101,), dtype=torch.uint8)
    for begin in range(9):
        assert same_bits(data[begin:], data[begin:].clone())
    square = torch.randn(6, 6)
    assert same_bits(square.t(), square.t().contiguous())


def test_different_sizes_are_different() -> None:
    assert not same_bits(torch.zeros(3), torch.zeros(4))


def test_views_that_leave_nothing_out_are_known_in_whatever_order() -> None:
    whole = torch.zeros(6, 4)
    assert are_all([whole], 96)
    assert are_all([whole[4:], whole[:1], whole[1:4]], 96)
    assert are_all([whole[:4], whole[2:]], 96)


def test_views_that_may_leave_something_out_are_not_all() -> None:
    whole = torch.zeros(6, 4)
    for views in ([whole[:5]], [whole[1:]], [whole[:2], whole[3:]], [whole[:, :2], whole[:, 2:]], [whole.t()], []):
        assert not are_all(views, 96)
