"""An engine whose linear layers keep their weights, as on CPUs without AVX-512: nothing packed to hand over."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters.live_engine import LiveEngine, fresh_oracle
from tests.adapters.swaps import ROUTES, check_every_failure, check_there_and_back
from tests.models import make_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("AsyncLLM"),
    pytest.mark.capability("assembled route"),
    pytest.mark.capability("reload route"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def unpacked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PLAIN_LINEAR", "1")  # read by the extension, in every worker
        yield


@pytest.mark.parametrize(
    "tied",
    [
        pytest.param(False, marks=pytest.mark.capability("undo after every k-th tensor")),
        pytest.param(True, marks=[pytest.mark.capability("tied weights"), pytest.mark.matrix]),
    ],
    ids=["untied", "tied"],
)
def test_plain_weights_are_swapped_and_undone_on_both_routes(tmp_path: Path, tied: bool) -> None:
    one, two = (make_checkpoint(tmp_path / f"v{seed}", seed, tied=tied) for seed in (1, 2))
    after = fresh_oracle(two)
    engine = LiveEngine(one)
    try:
        assert engine.extension("packed_layer_count") == 0
        before = engine.oracle()
        for route in ROUTES:
            engine.extension("inject_route", route)
            check_there_and_back(engine, two, before, after, route)
        if not tied:
            engine.extension("inject_route", "assembled")
            check_every_failure(engine, two, before, after)
    finally:
        engine.close()
