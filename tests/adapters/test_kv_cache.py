"""What a rank's KV cache may hold, and clearing all of it: plain lists and those of hybrid models."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hotweights.adapters import kv_cache  # noqa: E402

NAN = float("nan")


def a_runner(*caches: Any) -> Any:
    return SimpleNamespace(kv_caches=list(caches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_nan_spoils_a_cache_and_clearing_heals_it(dtype: Any) -> None:
    runner = a_runner(*(torch.ones(2, 8, 4, 16, dtype=dtype) for _ in range(3)))
    assert not kv_cache.may_be_spoilt(runner)
    runner.kv_caches[2][1, 7, 3, 15] = NAN
    assert kv_cache.may_be_spoilt(runner)
    kv_cache.clear(runner)
    assert not kv_cache.may_be_spoilt(runner)
    assert all(not cache.any() for cache in runner.kv_caches)


def test_the_states_of_a_hybrid_model_are_looked_at_and_cleared_too() -> None:
    states = [torch.zeros(4, 3), torch.zeros(4, 2, 2)]
    runner = a_runner(torch.zeros(2, 8), states, (torch.zeros(3), {"ssm": torch.zeros(5)}))
    assert not kv_cache.may_be_spoilt(runner)
    for at in (states[1], runner.kv_caches[2][1]["ssm"]):
        at.view(-1)[-1] = NAN
        assert kv_cache.may_be_spoilt(runner)
        kv_cache.clear(runner)
        assert not at.any()


def test_views_of_one_allocation_are_cleared_with_what_lies_between_them() -> None:
    """As vLLM lays out all layers in one: the padding of a block is read with it."""
    whole = torch.full((4, 10), NAN)
    runner = a_runner(whole.as_strided((4, 3), (10, 1)), whole.as_strided((4, 3), (10, 1), 5))
    kv_cache.clear(runner)
    assert not whole.any()


def test_a_cache_in_eight_bits_is_told_by_its_bit_patterns() -> None:
    numbers = torch.tensor([0.0, 1.0, -200.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert not kv_cache.may_be_spoilt(a_runner(numbers))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        spoilt = torch.tensor([0.0, NAN]).to(dtype)
        assert kv_cache.may_be_spoilt(a_runner(spoilt))
        assert kv_cache.may_be_spoilt(a_runner(spoilt.view(torch.uint8)))


def test_what_cannot_be_told_counts_as_spoilt_and_no_cache_as_clean() -> None:
    assert kv_cache.may_be_spoilt(a_runner(torch.zeros(4, dtype=torch.int8)))
    for runner in (a_runner(), a_runner(torch.zeros(0)), SimpleNamespace()):
        assert not kv_cache.may_be_spoilt(runner)
        kv_cache.clear(runner)
