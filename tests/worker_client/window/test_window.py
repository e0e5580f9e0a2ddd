"""The window: every way through it ends, and never in a third state."""

import asyncio
import dataclasses
import time

import pytest
from tests.worker_client.window.benches import until
from tests.worker_client.window.fakes import FakeEngine, fails, hangs, refuses

from hotweights.wire import failpoints
from hotweights.wire.failpoints import Injected
from hotweights.worker_client.window import window as window_module
from hotweights.worker_client.window.engine import EngineFailed, PauseMode, Process
from hotweights.worker_client.window.window import (
    NoProof,
    Outcome,
    Unanswered,
    WindowOrder,
    WindowResult,
    fingerprints,
    refusals,
    run_window,
    within,
)

TARGET = "/stage/v2"
PROCESSES = (Process(7, 1),)
BEFORE = (b"0:/base", b"1:/base")


def an_order(mode: PauseMode = "recompute") -> WindowOrder:
    return WindowOrder(
        folder=TARGET,
        version="v2",
        mode=mode,
        begin_by=time.monotonic() + 10,
        quiesce_deadline_s=0.2,
        apply_deadline_s=0.2,
        processes=PROCESSES,
    )


async def proof(engine: FakeEngine) -> tuple[bytes, ...]:
    assert not engine.paused, "all of it is fingerprinted beside serving"
    answers = await engine.rpc("hotweights_fingerprint", "call")
    if failed := refusals(answers):
        raise EngineFailed(failed)
    return fingerprints(answers)


async def opened(
    engine: FakeEngine, order: WindowOrder | None = None, before: tuple[bytes, ...] = BEFORE
) -> WindowResult:
    engine.prepared = engine.prepared or TARGET
    return await run_window(engine, order or an_order(), before, lambda: proof(engine))


def still_serves_base(engine: FakeEngine) -> bool:
    return engine.weights == ["/base", "/base"] and not engine.paused and not engine.killed


async def test_an_apply_pauses_writes_proves_resets_tags_and_resumes() -> None:
    engine = FakeEngine()
    result = await opened(engine)
    assert result.outcome is Outcome.APPLIED
    assert result.fingerprints == (b"0:/stage/v2", b"1:/stage/v2")
    assert engine.calls == ["pause", "apply", "reset", "tag", "resume", "fingerprint"]
    assert engine.tag == "v2"


async def test_an_order_that_is_no_longer_valid_touches_nothing() -> None:
    engine = FakeEngine()
    result = await opened(engine, dataclasses.replace(an_order(), begin_by=time.monotonic() - 1))
    assert result.outcome is Outcome.EXPIRED
    assert engine.calls == []


async def test_one_rank_that_fails_undoes_every_rank() -> None:
    engine = FakeEngine()
    refuses(engine, "apply", "no such tensor", rank=1)
    result = await opened(engine)
    assert result.outcome is Outcome.UNDONE
    assert "rank 1: no such tensor" in result.reason
    assert result.fingerprints == BEFORE
    assert still_serves_base(engine)


async def test_a_cache_that_is_still_held_undoes_the_apply() -> None:
    engine = FakeEngine()

    async def held() -> bool:
        return False

    engine.does["reset"] = held
    result = await opened(engine)
    assert result.outcome is Outcome.UNDONE
    assert "cache" in result.reason
    assert still_serves_base(engine)


async def test_a_fingerprint_other_than_the_expected_one_takes_the_apply_back_in_a_second_pause() -> None:
    engine = FakeEngine()
    order = dataclasses.replace(an_order("keep"), expected=(b"other", b"other"), version_before="v1")
    result = await opened(engine, order)
    assert result.outcome is Outcome.UNDONE
    assert "another" in result.reason
    assert engine.calls[:5] == ["pause", "apply", "tag", "resume", "fingerprint"]
    assert engine.calls[5:] == ["pause", "undo", "reset", "tag", "resume", "fingerprint"]
    assert engine.cleared_caches, "the engine ran on what it wrote"
    assert engine.tag == "v1"
    assert still_serves_base(engine)


async def test_ranks_that_cannot_be_fingerprinted_go_back() -> None:
    engine = FakeEngine()
    refuses(engine, "fingerprint", "broken")
    result = await opened(engine)
    assert result.outcome is Outcome.TORN, "nor can what they went back to"
    assert engine.weights == ["/base", "/base"]


async def test_an_engine_that_fell_asleep_meanwhile_keeps_what_was_read_back_in_the_pause() -> None:
    engine = FakeEngine()

    async def asleep() -> tuple[bytes, ...]:
        raise NoProof("it sleeps")

    engine.prepared = TARGET
    order = dataclasses.replace(an_order(), expected=(b"0:/stage/v2", b"1:/stage/v2"))
    result = await run_window(engine, order, BEFORE, asleep)
    assert (result.outcome, result.fingerprints) == (Outcome.APPLIED, ()), "nobody measured them"
    assert "it sleeps" in result.note


async def test_going_back_that_proves_something_else_tears_the_replica() -> None:
    engine = FakeEngine()
    await opened(engine)
    result = await opened(engine, dataclasses.replace(an_order(), folder="", expected=(b"never", b"seen")))
    assert result.outcome is Outcome.TORN


@pytest.mark.parametrize("silent", ["pause", "undo", "reset", "tag", "resume"])
async def test_a_second_pause_without_an_answer_tears_the_replica(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "RESUME_DEADLINE_S", 0.2)
    engine = FakeEngine()
    engine.prepared = TARGET

    async def proves_another() -> tuple[bytes, ...]:
        hangs(engine, silent)
        return (b"other", b"other")

    order = dataclasses.replace(an_order(), expected=(b"0:/stage/v2", b"1:/stage/v2"))
    assert (await run_window(engine, order, BEFORE, proves_another)).outcome is Outcome.TORN
    assert "did not answer" in engine.killed


async def test_a_bug_after_the_pause_leaves_an_engine_that_serves() -> None:
    engine = FakeEngine()
    failpoints.arm("window.resumed:raise")
    try:
        with pytest.raises(Injected):
            await opened(engine)
    finally:
        failpoints.arm("")
    assert not engine.paused
    assert not engine.killed


async def test_requests_that_do_not_drain_in_time_leave_the_engine_serving() -> None:
    engine = FakeEngine()
    hangs(engine, "pause")
    result = await opened(engine, an_order("drain"))
    assert result.outcome is Outcome.UNDONE
    assert "0.2 s" in result.reason
    assert engine.calls == ["pause", "resume"]
    assert still_serves_base(engine)


@pytest.mark.parametrize("silent", ["apply", "reset", "tag", "resume"])
async def test_a_call_without_an_answer_tears_the_replica(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "RESUME_DEADLINE_S", 0.2)
    engine = FakeEngine()
    hangs(engine, silent)
    result = await opened(engine)
    assert result.outcome is Outcome.TORN
    assert "did not answer within 0.2 s" in result.reason
    # FakeEngine asserts that nothing is called after the kill.
    assert engine.killed == result.reason


async def test_an_undo_that_fails_tears_the_replica() -> None:
    engine = FakeEngine()
    refuses(engine, "apply", "broken")
    refuses(engine, "undo", "broken too")
    assert (await opened(engine)).outcome is Outcome.TORN
    assert engine.killed


async def test_an_undo_that_proves_something_else_tears_the_replica() -> None:
    engine = FakeEngine()
    refuses(engine, "apply", "broken")
    engine.prepared = TARGET
    result = await opened(engine, before=(b"never", b"seen"))
    assert result.outcome is Outcome.TORN
    assert "did not bring back" in result.reason


async def test_fewer_answers_than_ranks_tear_the_replica() -> None:
    engine = FakeEngine()

    async def one(call: str, *args: object) -> list[dict[str, object]]:
        return [{"call": call, "rank": 0, "ok": True, "reason": "", "fingerprint": b""}]

    engine.does["apply"] = one
    result = await opened(engine)
    assert result.outcome is Outcome.TORN
    assert "1 answers of 2" in result.reason


async def test_an_answer_to_another_call_tears_the_replica() -> None:
    engine = FakeEngine()

    async def stale(call: str, *args: object) -> list[dict[str, object]]:
        return [{"call": "old", "rank": rank, "ok": True, "reason": "", "fingerprint": b""} for rank in (0, 1)]

    engine.does["apply"] = stale
    assert (await opened(engine)).outcome is Outcome.TORN


async def test_an_engine_that_dies_while_it_applies_is_torn() -> None:
    engine = FakeEngine()
    fails(engine, "apply", "EngineDeadError")
    result = await opened(engine)
    assert result.outcome is Outcome.TORN
    assert "EngineDeadError" in result.reason


async def test_kept_copies_bring_the_base_back_without_an_image() -> None:
    engine = FakeEngine()
    await opened(engine)
    order = dataclasses.replace(an_order(), folder="", version="v1", expected=BEFORE)
    result = await opened(engine, order)
    assert result.outcome is Outcome.APPLIED
    assert still_serves_base(engine)
    assert engine.tag == "v1"


async def test_going_back_that_fails_tears_the_replica() -> None:
    engine = FakeEngine()
    await opened(engine)
    refuses(engine, "undo", "gone")
    result = await opened(engine, dataclasses.replace(an_order(), folder=""))
    assert result.outcome is Outcome.TORN


async def test_the_times_of_the_parts_are_apart() -> None:
    engine = FakeEngine()

    async def slow(*args: object) -> None:
        await asyncio.sleep(0.05)

    engine.does["pause"] = slow
    times = (await opened(engine)).times
    assert times.quiesce_ms >= 45
    assert times.apply_ms < 45
    assert times.resume_ms < 45


async def test_an_engine_that_its_owner_paused_is_written_and_stays_paused() -> None:
    engine = FakeEngine()
    engine.owner_paused = True
    result = await opened(engine)
    assert result.outcome is Outcome.APPLIED
    assert "paused" in result.note


async def test_keep_drops_no_cache_and_salts_what_comes_after() -> None:
    engine = FakeEngine()
    result = await opened(engine, an_order("keep"))
    assert result.outcome is Outcome.APPLIED
    assert engine.calls == ["pause", "apply", "tag", "resume", "fingerprint"]
    assert engine.salt == "v2"


async def test_keep_drops_the_caches_after_an_undo_and_salts_nothing() -> None:
    engine = FakeEngine()
    refuses(engine, "apply", "broken")
    result = await opened(engine, an_order("keep"))
    assert result.outcome is Outcome.UNDONE
    assert engine.calls == ["pause", "apply", "undo", "reset", "resume", "fingerprint"]
    assert engine.salt == ""


async def test_a_torn_engine_is_condemned_and_its_processes_are_ended_by_id() -> None:
    engine = FakeEngine()
    hangs(engine, "apply")
    result = await opened(engine)
    assert engine.condemned == result.reason
    assert engine.ended == PROCESSES


async def test_a_torn_engine_that_is_to_stay_is_condemned_and_left_paused() -> None:
    engine = FakeEngine()
    hangs(engine, "apply")
    result = await opened(engine, dataclasses.replace(an_order(), processes=()))
    assert result.outcome is Outcome.TORN
    assert (engine.condemned, engine.killed, engine.paused) == (result.reason, "", True)


async def test_without_a_way_back_a_failed_apply_tears_the_replica() -> None:
    engine = FakeEngine()
    refuses(engine, "apply", "broken")
    result = await opened(engine, dataclasses.replace(an_order(), no_way_back="its weights were discarded"))
    assert result.outcome is Outcome.TORN
    assert result.reason == "its weights were discarded: rank 1: broken"
    assert "undo" not in engine.calls


@pytest.mark.parametrize("place", ["window.paused", "window.written"])
async def test_a_bug_in_the_pause_ends_the_engine_that_nobody_would_resume(place: str) -> None:
    engine = FakeEngine()
    failpoints.arm(f"{place}:raise")
    try:
        with pytest.raises(Injected):
            await opened(engine)
    finally:
        failpoints.arm("")
    assert engine.paused
    assert "the window was broken off" in engine.killed


async def test_a_window_that_is_cancelled_ends_the_engine_that_nobody_would_resume() -> None:
    engine = FakeEngine()
    hangs(engine, "apply")
    window = asyncio.ensure_future(opened(engine))
    await until(lambda: "apply" in engine.calls)
    window.cancel()
    with pytest.raises(asyncio.CancelledError):
        await window
    assert engine.paused
    assert "the window was broken off" in engine.killed


async def test_an_answer_that_came_while_this_process_stood_still_is_read() -> None:
    async def answered() -> str:
        await asyncio.to_thread(time.sleep, 0.05)
        return "done"

    call = asyncio.ensure_future(within(0.2, "apply", answered()))
    await asyncio.sleep(0)
    time.sleep(1.4)  # noqa: ASYNC251 - the loop stands still, as when the process is stopped
    assert await call == "done"


async def test_one_that_never_answers_is_given_up_though_this_process_stood_still() -> None:
    call = asyncio.ensure_future(within(0.1, "apply", asyncio.Event().wait()))
    await asyncio.sleep(0)
    time.sleep(1.4)  # noqa: ASYNC251 - as above
    with pytest.raises(Unanswered):
        await call
