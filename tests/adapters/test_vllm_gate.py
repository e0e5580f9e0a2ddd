"""Our window and the engine's owner, on a live engine: sleep, pauses of others, and requests that keep their blocks.

The tests share the engine of conftest.py; each leaves it serving v1, awake and unpaused.
"""

import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tests.worker_client.window.fakes import FakeAgent, FakeStream

from hotweights.v1 import update_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.worker_client.window.controller import Identity, ReplicaController
from hotweights.worker_client.window.identify import Images
from hotweights.worker_client.window.window import Outcome, WindowResult

from .live_engine import LONG_PROMPT, LiveEngine, Oracle
from .swaps import prepare_all, window

NOT_ALL_PROVEN = "not all of it was fingerprinted: its owner put the engine to sleep"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def in_thread(call: Callable[[], WindowResult]) -> "Future[WindowResult]":
    """The window beside the test, as a controller's thread has it."""
    done: Future[WindowResult] = Future()
    threading.Thread(target=lambda: done.set_result(call()), daemon=True).start()
    return done


class Orders:
    """A coordinator's orders to a controller beside the engine."""

    def __init__(self, engine: LiveEngine, folders: dict[str, Path]) -> None:
        self.engine = engine
        self.agent, self.stream = FakeAgent(), FakeStream()
        self.agent.held = {b"v1", b"v2"}
        self.agent.folders = {name.encode(): folder for name, folder in folders.items()}

    async def start(self) -> None:
        async def connect() -> Images:
            return self.agent

        self.controller = ReplicaController(Identity("r", "n"), self.engine.windowed, connect, self.stream.open)
        self._running = asyncio.ensure_future(self.controller.run())
        assert (await self.stream.take()).active_changed.active_digest == b"v1"

    async def prepare(self, version: str) -> None:
        assert await self.stream.give(prepare=pb.PrepareImage(manifest_digest=version.encode(), deadline_s=20)) == ""
        assert (await self.stream.take()).prepared.manifest_digest == version.encode()

    async def apply(self, version: str, **more: Any) -> pb.Report:
        order = pb.ApplyImage(
            manifest_digest=version.encode(),
            version=version,
            validity_s=5,
            quiesce_deadline_s=10,
            apply_deadline_s=20,
            **more,
        )
        assert await self.stream.give(apply=order) == ""
        return await self.stream.take()

    async def close(self) -> None:
        await self.stream.give(end=pb.EndUpdate())
        self.controller.close()
        await asyncio.wait_for(self._running, 10)

    async def in_engine(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(self.engine.submit(work))


def with_orders(
    engine: LiveEngine, folders: dict[str, Path], scene: Callable[[Orders], Coroutine[Any, Any, None]]
) -> None:
    async def played() -> None:
        orders = Orders(engine, folders)
        await orders.start()
        await scene(orders)
        await orders.close()

    asyncio.run(played())


@pytest.mark.capability("engine asleep")
@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_asleep_is_written_when_it_wakes_before_anything_is_scheduled(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, level: int
) -> None:
    async def scene(orders: Orders) -> None:
        await orders.in_engine(engine.llm.sleep(level))
        deferred = await orders.apply("v2")
        assert f"asleep at level {level}" in deferred.deferred.reason
        asked = engine.submit(engine.answer("t5 t6 t7 t8"))
        await asyncio.sleep(0.3)
        assert await orders.in_engine(engine.llm.is_sleeping())
        assert orders.stream.reports.empty()
        # Whoever wakes it has it awake on the new version.
        await orders.in_engine(engine.llm.wake_up())
        applied = await orders.stream.take()
        assert list(applied.applied.fingerprints) == [v2.fingerprint]
        assert not await orders.in_engine(engine.llm.is_paused())
        await asyncio.wrap_future(asked)
        assert await asyncio.to_thread(engine.tokens) == v2.tokens
        assert list((await orders.apply("v1", restore=True)).applied.fingerprints) == [v1.fingerprint]
        assert await asyncio.to_thread(engine.tokens) == v1.tokens

    with_orders(engine, folders, scene)


@pytest.mark.capability("engine asleep")
def test_a_sleeper_that_is_called_back_wakes_on_the_old_weights(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    async def scene(orders: Orders) -> None:
        await orders.in_engine(engine.llm.sleep(1))
        assert (await orders.apply("v2")).HasField("deferred")
        assert (await orders.apply("v1", restore=True)).apply_failed.failure == pb.APPLY_FAILURE_EXPIRED
        assert (await orders.stream.take()).applied.active_digest == b"v1"
        await orders.in_engine(engine.llm.wake_up())
        assert await asyncio.to_thread(engine.tokens) == v1.tokens

    with_orders(engine, folders, scene)


@pytest.mark.capability("engine asleep")
def test_an_engine_does_not_fall_asleep_while_its_ranks_read(engine: LiveEngine, v1: Oracle) -> None:
    live = engine.windowed

    async def scene() -> None:
        assert await live.read(True) == 0
        sleeps = asyncio.wrap_future(engine.submit(engine.llm.sleep(1)))
        await asyncio.sleep(0.3)
        assert not sleeps.done()
        await live.read(False)
        await asyncio.wait_for(sleeps, 10)
        assert await live.read(True) == 1
        await asyncio.wrap_future(engine.submit(engine.llm.wake_up()))
        assert await live.read(False) == 0

    asyncio.run(scene())
    assert engine.tokens() == v1.tokens


@pytest.mark.capability("paused by others")
def test_an_engine_that_somebody_paused_is_written_in_place_and_stays_paused(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    before = prepare_all(engine, folders["v2"])
    engine.call(engine.llm.pause_generation(mode="keep", clear_cache=False))
    result = window(engine, str(folders["v2"]), before)
    assert result.outcome is Outcome.APPLIED, result.reason
    assert "paused" in result.note
    asked = engine.submit(engine.answer("t5 t6 t7 t8"))
    time.sleep(0.5)
    assert not asked.done()
    assert engine.call(engine.llm.is_paused())
    engine.call(engine.llm.resume_generation())
    asked.result(30)
    assert engine.tokens() == v2.tokens
    assert window(engine, "", before).note == ""
    assert engine.tokens() == v1.tokens


@pytest.mark.capability("paused by others")
@pytest.mark.parametrize("calls", ["pause", "resume", "sleep"])
def test_what_others_ask_of_the_scheduler_waits_for_the_open_window(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, calls: str
) -> None:
    llm = engine.llm
    before = prepare_all(engine, folders["v2"])
    engine.inject("apply.end:hang=1")
    opened = in_thread(lambda: window(engine, str(folders["v2"]), before))
    time.sleep(0.4)  # the window hangs in its write
    asked = {
        "pause": lambda: llm.pause_generation(mode="keep"),
        "resume": llm.resume_generation,
        "sleep": lambda: llm.sleep(1),
    }
    engine.call(asked[calls]())
    # It was done after the window: before it, the window would have closed on what it asked for.
    assert opened.result(30).outcome is Outcome.APPLIED
    assert opened.result().note == (NOT_ALL_PROVEN if calls == "sleep" else "")
    engine.inject("")
    assert engine.call(llm.is_paused()) == (calls != "resume")
    engine.call(llm.wake_up() if calls == "sleep" else llm.resume_generation())
    assert engine.tokens() == v2.tokens
    assert window(engine, "", before).outcome is Outcome.APPLIED
    assert engine.tokens() == v1.tokens


@pytest.mark.capability("caches after a swap")
@pytest.mark.parametrize(
    "mode", ["recompute", "drain", "abort", pytest.param("keep", marks=pytest.mark.capability("inflight=keep"))]
)
def test_a_shared_prefix_asked_before_and_after_meets_no_block_of_the_old_weights(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, mode: Any
) -> None:
    for _ in range(2):  # the second time the blocks are there
        assert engine.call(engine.answer(LONG_PROMPT)) == v1.tokens[-1]
    before = prepare_all(engine, folders["v2"])
    running = engine.submit(engine.answer("t5 t6", 300))
    time.sleep(0.3)
    result = window(engine, str(folders["v2"]), before, mode)
    assert result.outcome is Outcome.APPLIED, result.reason
    assert engine.call(engine.answer(LONG_PROMPT)) == v2.tokens[-1]
    assert len(running.result(60)) == 300 or mode == "abort"
    assert engine.tokens() == v2.tokens
    assert window(engine, "", before, mode).outcome is Outcome.APPLIED
    assert engine.tokens() == v1.tokens


@pytest.mark.capability("inflight=keep")
def test_requests_that_wait_while_the_window_is_open_meet_no_old_block_under_keep(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    assert engine.call(engine.answer(LONG_PROMPT)) == v1.tokens[-1]
    before = prepare_all(engine, folders["v2"])
    engine.call(engine.llm.pause_generation(mode="keep", clear_cache=False))
    waiting = engine.submit(engine.answer(LONG_PROMPT))
    time.sleep(0.3)
    assert window(engine, str(folders["v2"]), before, "keep").outcome is Outcome.APPLIED
    engine.call(engine.llm.resume_generation())
    assert waiting.result(30) == v2.tokens[-1]
    assert window(engine, "", before, "keep").outcome is Outcome.APPLIED
    assert engine.tokens() == v1.tokens


@pytest.mark.capability("inflight=keep")
def test_keep_lets_requests_in_flight_go_on_over_what_is_computed(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    """Over a window that writes the same weights again they end as if there had been none."""
    undisturbed = engine.call(engine.answer(LONG_PROMPT, 200))
    running = engine.submit(engine.answer(LONG_PROMPT, 200))
    time.sleep(0.3)
    before = prepare_all(engine, folders["v1"])
    assert window(engine, str(folders["v1"]), before, "keep").outcome is Outcome.APPLIED
    assert running.result(60) == undisturbed
    assert engine.rpc("release")["ok"]


@pytest.mark.capability("inflight=keep")
def test_the_mode_of_an_order_reaches_the_engine(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    async def scene(orders: Orders) -> None:
        await orders.prepare("v2")
        applied = await orders.apply("v2", inflight=update_pb2.INFLIGHT_KEEP)
        assert list(applied.applied.fingerprints) == [v2.fingerprint]
        assert (await orders.apply("v1", restore=True)).applied.active_digest == b"v1"

    with_orders(engine, folders, scene)
    assert engine.tokens() == v1.tokens
