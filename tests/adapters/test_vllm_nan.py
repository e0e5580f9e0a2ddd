"""A version with NaN in it, on a live engine: refused where that is asked for, and forgotten after going back.

The engine has so few cache blocks that each is used again and again: what a bad version left in one is met at once.
"""

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.live_engine import LiveEngine, Oracle
from tests.adapters.swaps import prepare, window
from tests.models import make_checkpoint

from hotweights.worker_client.window.window import Outcome

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

BLOCKS = 12
KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """v1 and v2; and bad, which is v1 with NaN among the first layer's keys."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: make_checkpoint(root / name, seed) for name, seed in (("v1", 1), ("v2", 2), ("bad", 1))}
    tensors = load_file(made["bad"] / "model.safetensors")
    tensors[KEYS][:3, 0] = float("nan")
    save_file(tensors, made["bad"] / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[LiveEngine]:
    engine = LiveEngine(folders["v1"], num_gpu_blocks_override=BLOCKS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def v1(engine: LiveEngine) -> Oracle:
    return engine.oracle()


def ask_much(engine: LiveEngine) -> None:
    """Enough for every cache block to be used."""

    async def ask() -> None:
        await asyncio.gather(*(engine.answer(f"t{n} t{n + 1} t{n + 2}", 300) for n in range(8)))

    engine.call(ask())


def swap(engine: LiveEngine, folder: str) -> None:
    """A window on the live engine; "" puts back the kept copies."""
    result = window(engine, folder, ())
    assert result.outcome is Outcome.APPLIED, result


def serve_nan(engine: LiveEngine, folders: dict[str, Path], v1: Oracle) -> None:
    """The bad version applied and asked until its NaN is in every block."""
    assert not prepare(engine, folders["bad"])["caches_spoilt"]
    swap(engine, str(folders["bad"]))
    ask_much(engine)
    assert engine.tokens() != v1.tokens


def test_a_version_with_nan_is_refused_by_tensor_and_count_while_the_engine_serves(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    refused = prepare(engine, folders["bad"], check_finite=True)
    assert not refused["ok"]
    assert f"{KEYS} has 3 of 2048" in refused["reason"]
    assert not engine.rpc("apply", str(folders["bad"]))["ok"]
    assert engine.oracle() == v1
    assert prepare(engine, folders["v2"], check_finite=True)["ok"]
    assert engine.rpc("release")["ok"]


def test_what_was_prepared_unchecked_is_prepared_anew_when_a_check_is_asked_for(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    assert prepare(engine, folders["bad"])["ok"]
    assert not prepare(engine, folders["bad"], check_finite=True)["ok"]
    assert engine.oracle() == v1


def test_going_back_from_nan_by_the_kept_copies_leaves_none_in_the_cache(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    serve_nan(engine, folders, v1)
    swap(engine, "")
    for _ in range(3):
        assert engine.tokens() == v1.tokens
        ask_much(engine)
    assert engine.oracle() == v1
    assert engine.rpc("release")["ok"]


def test_going_from_nan_to_another_version_leaves_none_in_the_cache(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    serve_nan(engine, folders, v1)
    assert engine.rpc("release")["ok"]
    assert prepare(engine, folders["v1"])["caches_spoilt"]
    swap(engine, str(folders["v1"]))
    for _ in range(3):
        assert engine.tokens() == v1.tokens
        ask_much(engine)
    assert engine.oracle() == v1
    assert engine.rpc("release")["ok"]


def test_a_failed_apply_is_undone_without_the_price_of_clearing_the_cache(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    marked: dict[str, Any] = engine.extension("mark_caches", 1.5)
    assert prepare(engine, folders["v2"])["ok"]
    engine.inject("apply.end:raise")
    assert not engine.rpc("apply", str(folders["v2"]))["ok"]
    engine.inject("")
    assert engine.rpc("undo", {"clear_caches": False})["ok"]
    assert engine.extension("sum_of_caches") == marked["sum"]
    assert engine.rpc("release")["ok"]
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v1
