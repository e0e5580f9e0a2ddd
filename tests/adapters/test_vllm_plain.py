"""An engine whose linear layers keep their weights, as on CPUs without AVX-512: nothing packed to hand over."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters.live_engine import LiveEngine, Oracle, fresh_oracle
from tests.adapters.swaps import ROUTES, check_every_failure, check_there_and_back, prepare, undo
from tests.models import make_checkpoint

MODULES = 15  # that loaders write: two embeddings, five norms, four linear layers in each of two
ROUTE_OF = {"auto": "direct", "assembled": "assembled", "reload": "reload"}

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("AsyncLLM"),
    pytest.mark.capability("direct route"),
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


def check_proofs(engine: LiveEngine, folder: Path, before: Oracle, after: Oracle, modules: int) -> None:
    """Without an image that gives what is installed nothing is written directly, and all the same it is right."""
    engine.extension("inject_route", "auto")
    # A plan that was proven once needs no image any longer; then again as new.
    for forget, base, direct, reason in (
        (False, "", modules, ""),
        (True, "", 0, "not known here"),
    ):
        if forget:
            engine.extension("forget_plans")
        routes = prepare(engine, folder, base=base)["routes"]
        assert routes["direct"][0] == direct
        assert [reason for told in routes["reasons"] if reason in told][:1] == [reason] * bool(reason)
        assert engine.rpc("apply", str(folder))["ok"]
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == after
        undo(engine)
        assert engine.oracle() == before
        assert engine.rpc("release")["ok"]
    engine.extension("forget_plans")
    refused = prepare(engine, folder, base=folder)
    assert "said to be installed" in refused["reason"]
    assert engine.rpc("release")["ok"]


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
        before, modules = engine.oracle(), dict[str, int]()
        for route in ROUTES:
            engine.extension("inject_route", route)
            routes = check_there_and_back(engine, two, before, after)
            counts = {name: routes[name][0] for name in ("direct", "assembled", "reload")}
            modules[route] = counts[ROUTE_OF[route]]
            assert modules[route] in (MODULES, MODULES - tied)  # a tied head is written by itself in vLLM before 0.32
            assert counts == {**dict.fromkeys(counts, 0), ROUTE_OF[route]: modules[route]}
        check_proofs(engine, two, before, after, modules["auto"])
        if not tied:
            engine.extension("inject_route", "direct")
            check_every_failure(engine, two, before, after)
    finally:
        engine.close()
