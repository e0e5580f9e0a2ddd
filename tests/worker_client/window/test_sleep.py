"""An engine whose owner put it to sleep: nothing is touched, and the window opens when it is woken."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.worker_client.window.benches import V1, V2, V3, Bench, running, until
from tests.worker_client.window.fakes import FakeEngine, fails, hangs, refuses

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1.agent_service_pb2 import BorrowImageResponse

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


async def test_no_upload_into_gpu_memory_begins_while_it_sleeps_or_is_waited_for_when_it_wakes(bench: Bench) -> None:
    asked: list[bool] = []

    async def never(digest: bytes, client_id: str, *, upload: bool) -> BorrowImageResponse:
        asked.append(upload)
        return BorrowImageResponse(coming=upload)

    bench.agent.borrow_image = never  # type: ignore[method-assign]
    await bench.prepare(V2)
    await bench.apply(V2)
    assert asked == []
    bench.engine.wake()
    assert (await bench.stream.take()).applied.active_digest == V2
    assert asked == [False]


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


async def test_one_torn_on_waking_is_torn_and_asked_nothing_more(bench: Bench) -> None:
    assert (await bench.apply(V2)).HasField("deferred")
    hangs(bench.engine, "apply")
    bench.engine.wake()
    report = await bench.stream.take()
    assert report.apply_failed.failure == pb.APPLY_FAILURE_TORN
    assert bench.engine.killed
    assert bench.engine.calls[-1] == "apply"
    assert "torn" in await bench.stream.give(apply=pb.ApplyImage(manifest_digest=V1, restore=True))


async def test_an_engine_that_cannot_be_let_wake_changes_no_result(bench: Bench) -> None:
    fails(bench.engine, "let_wake", "the engine core is dead")
    assert (await bench.apply(V2, asleep_deadline_s=0.05)).HasField("deferred")
    assert "still asleep" in (await bench.stream.take()).apply_failed.reason


def slow_prepare(bench: Bench) -> asyncio.Event:
    """Every rank answers that it is not done, until the event."""
    done = asyncio.Event()

    async def prepared(call: str) -> Any:
        if done.is_set():
            bench.engine.does.pop("prepared")
            return None
        return [{"call": call, "rank": rank, "ok": True, "done": False} for rank in range(2)]

    bench.engine.does["prepared"] = prepared
    return done


@pytest.mark.parametrize("awake_at_go", [False, True])
async def test_what_could_not_be_checked_asleep_is_checked_however_long_go_is_valid(
    bench: Bench, awake_at_go: bool
) -> None:
    done = slow_prepare(bench)
    await bench.prepare(V2)
    if awake_at_go:
        bench.engine.wake()
    assert (await bench.apply(V2, validity_s=0.1, apply_deadline_s=20)).HasField("deferred")
    bench.engine.wake()
    await until(lambda: "prepared" in bench.engine.calls)
    await asyncio.sleep(0.2)
    done.set()
    assert (await bench.stream.take()).applied.active_digest == V2


async def test_an_order_that_comes_while_it_is_checked_on_waking_calls_it_back(bench: Bench) -> None:
    done = slow_prepare(bench)
    assert (await bench.apply(V2, apply_deadline_s=20)).HasField("deferred")
    bench.engine.wake()
    await until(lambda: "prepared" in bench.engine.calls)
    assert await bench.stream.give(apply=pb.ApplyImage(manifest_digest=V1, restore=True, validity_s=5)) == ""
    done.set()
    assert "called back" in (await bench.stream.take()).apply_failed.reason
    assert (await bench.stream.take()).applied.active_digest == V1
    assert "pause" not in bench.engine.calls


async def test_the_way_back_is_taken_however_long_it_waited_behind_what_it_takes_back(bench: Bench) -> None:
    bench.engine.asleep = 0
    await bench.prepare(V2)
    resumed = bench.engine.resume

    async def slowly(salt: str) -> bool:
        await asyncio.sleep(0.2)
        return await resumed(salt)

    bench.engine.resume = slowly  # type: ignore[method-assign]
    assert await bench.stream.give(apply=pb.ApplyImage(manifest_digest=V2, validity_s=5, apply_deadline_s=1)) == ""
    back = pb.ApplyImage(manifest_digest=V1, restore=True, validity_s=0.05, quiesce_deadline_s=1, apply_deadline_s=1)
    assert await bench.stream.give(apply=back) == ""
    assert (await bench.stream.take()).applied.active_digest == V2
    assert (await bench.stream.take()).applied.active_digest == V1


async def test_it_is_kept_awake_until_the_last_rank_has_stopped_reading(bench: Bench) -> None:
    bench.engine.asleep = 0
    refuses(bench.engine, "prepare", "no such tensor")
    refuses(bench.engine, "release", "still preparing")
    assert await bench.stream.give(prepare=pb.PrepareImage(manifest_digest=V2, deadline_s=5)) == ""
    await until(lambda: bench.engine.calls.count("release") > 1)
    assert bench.engine.reading
    bench.engine.does.clear()
    assert "no such tensor" in (await bench.stream.take()).prepare_failed.reason
    assert not bench.engine.reading


async def test_copies_of_another_update_are_no_way_back_from_what_level_2_discarded() -> None:
    engine = FakeEngine()
    engine.device = "cuda:0"
    async with running(Bench(engine=engine)) as bench:
        await bench.prepare(V3)
        engine.asleep = 2
        assert (await bench.apply(V2)).HasField("deferred")
        refuses(engine, "apply", "broken")
        engine.wake()
        report = await bench.stream.take()
        assert report.apply_failed.failure == pb.APPLY_FAILURE_TORN


async def test_what_was_prepared_before_level_2_discarded_the_weights_is_prepared_anew() -> None:
    """It holds what differs from weights that are gone: written onto garbage, garbage is what serves."""
    engine = FakeEngine()
    engine.device = "cuda:0"
    async with running(Bench(engine=engine)) as bench:
        await bench.prepare(V2)
        engine.asleep = 2
        assert (await bench.apply(V2)).HasField("deferred")
        engine.calls.clear()
        engine.wake()
        assert (await bench.stream.take()).applied.active_digest == V2
        assert engine.calls.index("prepare") < engine.calls.index("apply")
        assert engine.anew
        assert engine.base == "", "nothing is known of what is there"


async def test_the_way_back_that_level_2_discarded_is_taken_from_its_image() -> None:
    engine = FakeEngine()
    engine.device = "cuda:0"
    async with running(Bench(engine=engine)) as bench:
        bench.agent.folders[V1] = Path("/base")  # as these engines tell versions apart
        await bench.prepare(V2)
        await bench.apply(V2)
        engine.asleep = 2
        assert (await bench.apply(V1, restore=True)).HasField("deferred")
        engine.calls.clear()
        engine.wake()
        report = await bench.stream.take()
        assert report.applied.active_digest == V1, report
        assert "undo" not in engine.calls
        assert engine.weights == ["/base"] * 2
