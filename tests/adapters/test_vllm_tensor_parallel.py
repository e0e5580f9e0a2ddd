"""Tensor parallel 2 on a live engine: both ranks or neither.

The tests share the engine; each leaves it serving v1. The last one tears it.
"""

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults_recorder import FaultRow
from tests.models import make_checkpoint

from hotweights.worker_client.window.window import Outcome

from .live_engine import LiveEngine, Oracle, fresh_oracle
from .swaps import CAPABILITIES, ROUTES, WRITES_MAX, check_ended, prepare_all, ranks, window

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("tensor parallel 2"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, seed) for name, seed in (("v1", 1), ("v2", 2))}


@pytest.fixture(scope="module")
def v2(folders: dict[str, Path]) -> Oracle:
    return fresh_oracle(folders["v2"], tensor_parallel_size=2)


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path], v2: Oracle) -> Iterator[LiveEngine]:
    engine = LiveEngine(folders["v1"], tensor_parallel_size=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def v1(engine: LiveEngine) -> Oracle:
    """Asked before anything was swapped: this engine is freshly started too."""
    return engine.oracle()


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.capability(CAPABILITIES[name])) for name in ROUTES])
def route(request: pytest.FixtureRequest, engine: LiveEngine) -> Iterator[str]:
    engine.extension("inject_route", request.param)
    yield request.param
    engine.extension("inject_route", "auto")


def test_a_swap_equals_a_fresh_engine_in_every_rank_and_so_does_the_way_back(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, route: str
) -> None:
    before = prepare_all(engine, folders["v2"])
    assert len(before) == 2
    assert b"".join(before) == v1.fingerprint
    applied = window(engine, str(folders["v2"]), before)
    assert applied.outcome is Outcome.APPLIED, applied.reason
    assert b"".join(applied.fingerprints) == v2.fingerprint
    assert engine.oracle() == v2
    back = window(engine, "", before)
    assert back.outcome is Outcome.APPLIED, back.reason
    assert engine.oracle() == v1


@pytest.mark.capability("undo after every k-th tensor")
def test_a_failure_of_one_rank_after_every_kth_write_undoes_both(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, route: str, fault_row: FaultRow
) -> None:
    fault_row.about("rank-fails-at-tensor")
    slowest_s = 0.0
    for k in range(WRITES_MAX):
        before = prepare_all(engine, folders["v2"])
        engine.inject(f"apply.tensor={k}:raise", rank=1)
        result = window(engine, str(folders["v2"]), before)
        engine.inject("")
        if result.outcome is Outcome.APPLIED:
            break
        assert result.outcome is Outcome.UNDONE, (k, result.reason)
        assert "rank 1: Injected" in result.reason
        assert "rank 0" not in result.reason
        assert b"".join(result.fingerprints) == v1.fingerprint, k
        slowest_s = max(slowest_s, (result.times.apply_ms + result.times.resume_ms) / 1000)
        assert engine.oracle() == v1, k
    assert k > 2
    assert engine.oracle() == v2
    assert window(engine, "", before).outcome is Outcome.APPLIED
    assert engine.oracle() == v1
    fault_row.ended(f"undone in both at each of {k} places, then applied", recover_s=slowest_s)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["apply.start", "apply.tensor=0", "apply.end"])
def test_a_failure_of_either_rank_before_while_and_after_it_writes_undoes_both(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, place: str, rank: int
) -> None:
    before = prepare_all(engine, folders["v2"])
    engine.inject(f"{place}:raise", rank=rank)
    result = window(engine, str(folders["v2"]), before)
    engine.inject("")
    assert result.outcome is Outcome.UNDONE, result
    assert f"rank {rank}: Injected" in result.reason
    assert engine.oracle() == v1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_either_rank_while_it_prepares_touches_nothing(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, rank: int
) -> None:
    assert all(answer["ok"] for answer in engine.rpc_all("release"))
    engine.inject("prepare.start:raise", rank=rank)
    engine.rpc_all("prepare", str(folders["v2"]), {}, {"base": str(folders["v1"])})
    answers = engine.rpc_all("prepared")
    while any(answer["ok"] and not answer["done"] for answer in answers):
        answers = engine.rpc_all("prepared")
    engine.inject("")
    assert [answer["ok"] for answer in answers] == [at != rank for at in (0, 1)]
    assert all(answer["ok"] for answer in engine.rpc_all("release"))
    assert engine.oracle() == v1


def test_a_rank_that_is_killed_in_the_pause_tears_the_replica_and_ends_its_processes(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    before = prepare_all(engine, folders["v2"])
    processes = (*asyncio.run(engine.windowed.cores()), *ranks(engine))
    engine.inject("apply.tensor=1:kill", rank=1)
    result = window(engine, str(folders["v2"]), before, apply_deadline_s=10.0)
    assert result.outcome is Outcome.TORN, result
    check_ended(processes)
