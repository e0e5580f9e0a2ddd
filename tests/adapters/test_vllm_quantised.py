"""Layers that vLLM processes after loading, on live engines: quantised ones, and experts that a CPU packs."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.architecture_engine import ArchitectureEngine, fresh
from tests.architectures import Recorded
from tests.tiny_models import make_int4_model, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

Make = Callable[[Path, int], Path]


def mixtral(folder: Path, seed: int) -> Path:
    return make_tiny_model(folder, "mixtral", seed)


@pytest.fixture(params=["int4", "experts"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "experts":
            patch.setenv("TEST_PLAIN_LINEAR", "1")  # so that the experts are all that is packed
        yield request.param


@pytest.mark.capability("processed layers")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.matrix)], ids=["alone", "tensor parallel 2"])
def test_what_is_processed_is_swapped_undone_and_fails_as_a_whole(
    kind: str, ranks: int, tmp_path: Path, recorded: Recorded
) -> None:
    make: Make = make_int4_model if kind == "int4" else mixtral
    one, two = (make(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    after = fresh(two, ranks)
    engine = ArchitectureEngine(one, ranks)
    if kind == "int4":
        recorded.begin("class" if engine.is_mute else "engine", kind, ranks)
    try:
        before = engine.found()
        assert before["fingerprints"] != after["fingerprints"]
        assert engine.is_mute or before["answers"] != after["answers"]
        routes = engine.prepare(two, one)
        for route in routes:
            check_routes(kind, route)
        for _ in range(2):
            engine.call("apply", str(two))
            assert engine.found() == after
            engine.call("undo")
            assert engine.found() == before
        for place in ("apply.tensor=0", "apply.tensor=5", "apply.end"):
            engine.live.inject(f"{place}:raise")
            failed = engine.live.rpc_all("apply", str(two))
            engine.live.inject("")
            assert all("Injected" in answer["reason"] for answer in failed), place
            engine.call("undo")
            assert engine.found() == before, place
        engine.call("apply", str(two))
        assert engine.found() == after
    finally:
        engine.close()
    recorded.ended(routes)


def check_routes(kind: str, routes: dict[str, Any]) -> None:
    """Two embeddings and five norms are direct; eight linear layers, or the experts of two, are not."""
    if kind == "experts":
        assert routes["assembled"][0] == 2
        assert routes["reload"][0] == 0
        assert any("w13_weight" in reason for reason in routes["reasons"])
    else:
        assert routes["reload"][0] == 8
        assert any("processed by AutoGPTQLinearMethod" in reason for reason in routes["reasons"])
