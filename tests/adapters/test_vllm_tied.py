"""Tied embeddings on a live engine.

vLLM's own reload loads only the first of two tied layers; on CPUs that pack weights the other one (`lm_head`) goes on
computing with the packed old weights. Ours packs it again.
"""

import importlib.util
from pathlib import Path

import pytest
from tests.adapters.live_engine import LiveEngine, fresh_oracle
from tests.adapters.swaps import ROUTES, check_there_and_back
from tests.models import make_checkpoint


@pytest.mark.vllm
@pytest.mark.capability("tied weights")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_is_swapped_and_undone_too(tmp_path: Path) -> None:
    one, two = (make_checkpoint(tmp_path / f"v{seed}", seed, tied=True) for seed in (1, 2))
    after = fresh_oracle(two)
    engine = LiveEngine(one)
    try:
        before = engine.oracle()
        for route in ROUTES:
            engine.extension("inject_route", route)
            check_there_and_back(engine, two, before, after)
    finally:
        engine.close()
