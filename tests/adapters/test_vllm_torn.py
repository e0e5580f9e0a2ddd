"""An engine in doubt is ended. Last of the tests that share the engine: nothing of it is left afterwards."""

import asyncio
import importlib.util
import time
from pathlib import Path

import pytest

from hotweights.worker_client.window.window import Outcome

from .live_engine import LiveEngine, Oracle
from .swaps import check_ended, prepare, ranks, window

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def test_a_rank_that_hangs_tears_the_engine_and_its_process_is_ended(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    before = (prepare(engine, folders["v2"])["fingerprint"],)
    processes = (*asyncio.run(engine.windowed.cores()), *ranks(engine))
    engine.inject("apply.start:hang=60")
    begun = time.monotonic()
    result = window(engine, str(folders["v2"]), before, apply_deadline_s=1.0)
    assert result.outcome is Outcome.TORN
    assert "did not answer within 1 s" in result.reason
    assert time.monotonic() - begun < 10
    check_ended(processes)
