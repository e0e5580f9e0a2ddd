"""An engine whose owner put it to sleep: nothing is touched, and the window opens when it is woken."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.worker_client.window.benches import V1, V2, Bench, running, until
from tests.worker_client.window.fakes import hangs

from hotweights.v1 import worker_service_pb2 as pb

TOUCHES = {"pause", "prepare", "prepared", "apply", "undo", "fingerprint", "release"}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running(Bench()) as bench:
        bench.engine.asleep = 1
        bench.engine.calls.clear()
        yield bench


def untouched(bench: Bench) -> bool:
    return not TOUCHES & set(bench.engine.calls)


async def test_what_is_staged_is_only_mapped_and_go_waits_for_the_wake_up(bench: Bench) -> None:
    prepared = (await bench.prepare(V2)).prepared
    assert (prepared.manifest_digest, prepared.base_digest) == (V2, V1)
    deferred = await bench.apply(V2)
    assert "asleep at level 1" in deferred.deferred.reason
    assert bench.stream.hello is not None
    assert bench.stream.hello().replica.open_window == "u1"
    await asyncio.sleep(0.05)
    assert untouched(bench)
    bench.engine.wake()
    report = await bench.stream.take()
    assert report.applied.active_digest == V2
    assert (report.number, report.update_id) == (deferred.number, "u1")
    calls = [
        call for call in bench.engine.calls if call in ("await_wake", "prepare", "pause", "apply", "resume", "let_wake")
    ]
    assert calls == ["await_wake", "prepare", "pause", "apply", "resume", "let_wake"]
    assert bench.stream.hello().replica.open_window == ""


async def test_its_deadline_counts_from_the_wake_up(bench: Bench) -> None:
    assert (await bench.apply(V2, validity_s=0.1)).HasField("deferred")
    await asyncio.sleep(0.2)
    bench.engine.wake()
    assert (await bench.stream.take()).applied.active_digest == V2


async def test_a_newer_order_calls_it_back_untouched(bench: Bench) -> None:
    assert (await bench.apply(V2)).HasField("deferred")
    restored = await bench.apply(V1, restore=True)
    assert restored.apply_failed.failure == pb.APPLY_FAILURE_EXPIRED
    assert "called back" in restored.apply_failed.reason
    assert (await bench.stream.take()).applied.active_digest == V1
    assert untouched(bench)
    assert bench.engine.calls[-1] == "let_wake"


async def test_one_that_never_wakes_expires_untouched(bench: Bench) -> None:
    assert (await bench.apply(V2, asleep_deadline_s=0.05)).HasField("deferred")
    report = await bench.stream.take()
    assert report.apply_failed.failure == pb.APPLY_FAILURE_EXPIRED
    assert "still asleep" in report.apply_failed.reason
    assert untouched(bench)


async def test_a_new_leader_is_told_that_go_is_taken(bench: Bench) -> None:
    deferred = await bench.apply(V2)
    bench.stream.welcome()
    assert await bench.stream.take() == deferred
    bench.engine.wake()
    await bench.stream.take()
    bench.stream.welcome()
    assert bench.stream.reports.empty()


async def test_ranks_that_prepare_keep_the_engine_awake_until_they_are_through(bench: Bench) -> None:
    bench.engine.asleep = 0
    await bench.prepare(V2)
    assert not bench.engine.reading
    hangs(bench.engine, "prepared")
    given = asyncio.ensure_future(bench.prepare(b"v3"))
    await until(lambda: "prepared" in bench.engine.calls and bench.engine.reading)
    given.cancel()


async def test_the_way_back_of_one_that_fell_asleep_after_its_window_waits_too(bench: Bench) -> None:
    bench.engine.asleep = 0
    await bench.prepare(V2)
    await bench.apply(V2)
    bench.engine.asleep = 2
    assert (await bench.apply(V1, restore=True)).HasField("deferred")
    assert bench.engine.weights == ["/stage/v2", "/stage/v2"]
    bench.engine.wake()
    assert (await bench.stream.take()).applied.active_digest == V1
    assert bench.engine.weights == ["/base", "/base"]


async def test_a_failure_on_waking_from_level_2_on_a_device_cannot_be_undone(bench: Bench) -> None:
    """Its parameters came back as garbage, which no copy of before could bring back."""
    from tests.worker_client.window.fakes import FakeEngine, refuses

    engine = FakeEngine()
    engine.device = "cuda:0"
    async with running(Bench(engine=engine)) as bench:
        engine.asleep = 2
        assert (await bench.apply(V2)).HasField("deferred")
        refuses(engine, "apply", "broken")
        engine.wake()
        report = await bench.stream.take()
        assert report.apply_failed.failure == pb.APPLY_FAILURE_TORN
        assert "sleep level 2" in report.apply_failed.reason
        assert engine.killed


async def test_a_check_asked_for_while_it_slept_is_made_when_it_wakes(bench: Bench) -> None:
    await bench.prepare(V2, check_finite=True)
    assert (await bench.apply(V2)).HasField("deferred")
    bench.engine.wake()
    assert (await bench.stream.take()).applied.active_digest == V2
    assert bench.engine.checks_finite
