"""An engine in doubt is ended. Last of the tests that share the engine: nothing of it is left afterwards."""

import asyncio
import importlib.util
import time
from pathlib import Path

import pytest

from hotweights.worker_client.window.window import Outcome

from .live_engine import LiveEngine, Oracle
from .swaps import check_ended, prepare_all, ranks, runs, window

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("a hanging rank is ended"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def test_an_engine_in_doubt_that_is_to_stay_is_left_paused_and_not_ready(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    processes = (*asyncio.run(engine.windowed.cores()), *ranks(engine))
    before = prepare_all(engine, folders["v2"])
    engine.call(engine.llm.check_health())
    engine.inject("apply.start:hang=2")
    result = window(engine, str(folders["v2"]), before, apply_deadline_s=0.5, torn_stays=True)
    assert result.outcome is Outcome.TORN
    assert "did not answer within 0.5 s" in result.reason
    with pytest.raises(EngineDeadError):
        engine.call(engine.llm.check_health())
    time.sleep(2)  # the write that hung goes on and ends; nothing resumes the engine
    assert all(runs(process.pid) for process in processes)
    asked = engine.submit(engine.answer("t5 t6"))
    time.sleep(0.5)
    assert not asked.done()


def test_the_processes_of_an_engine_in_doubt_are_ended(engine: LiveEngine) -> None:
    live = engine.windowed
    processes = (*asyncio.run(live.cores()), *ranks(engine))
    engine.submit(engine.llm.collective_rpc("inject_failpoints", args=("undo.start:hang=60",))).result(10)
    engine.submit(engine.llm.collective_rpc("hotweights_undo", args=("test",)))
    time.sleep(0.2)  # a rank that hangs hears no SIGTERM and does not notice that its core is gone
    asyncio.run(live.kill(processes, "the test says so"))
    check_ended(processes)
