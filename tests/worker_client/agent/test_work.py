"""Shared work: it lives as long as somebody waits for it, and threads let go before their files do."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from hotweights.transports.threads import in_thread
from hotweights.worker_client.agent.work import OutOfTime, Work
from hotweights.worker_client.stage.threads import CalledOff, Figures, stoppable


async def forever() -> None:
    await asyncio.sleep(60)


async def test_work_goes_on_while_one_of_two_waits_and_ends_with_the_last() -> None:
    work = Work(forever(), Figures(), kept=False)
    one, two = (asyncio.ensure_future(work.result(60)) for _ in range(2))
    await asyncio.sleep(0.01)
    one.cancel()
    await asyncio.wait({one})
    await asyncio.sleep(0.01)
    assert not work.is_over
    two.cancel()
    await asyncio.wait({two})
    assert work.is_over
    await asyncio.wait({work.task}, timeout=5)
    assert work.task.cancelled()


async def test_a_callers_deadline_does_not_end_the_work_of_others() -> None:
    work = Work(forever(), Figures(), kept=False)
    patient = asyncio.ensure_future(work.result(60))
    await asyncio.sleep(0)
    with pytest.raises(OutOfTime):
        await work.result(0.05)
    assert not work.is_over
    patient.cancel()
    await asyncio.wait({patient, work.task}, timeout=5)


async def test_kept_work_outlives_its_callers() -> None:
    work = Work(asyncio.sleep(0.1, result="done"), Figures(), kept=True)
    with pytest.raises(OutOfTime):
        await work.result(0.01)
    assert await work.result(5) == "done"


async def test_figures_are_told_only_when_they_changed() -> None:
    figures = Figures()
    release = asyncio.Event()

    async def two_steps() -> None:
        figures.write(1, 2)
        await release.wait()
        figures.write(2, 2)

    work = Work(two_steps(), figures, kept=True)
    told = []
    async for figure in work.follow(10):
        told.append(figure)
        asyncio.get_running_loop().call_later(0.6, release.set)  # two looks without news
    assert told == [(1, 2), (2, 2)]


async def test_a_cancelled_thread_is_waited_for() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(stop: Callable[[], bool]) -> None:
        begun.set()
        step = stoppable(lambda done, total: None, stop)
        try:
            while True:
                time.sleep(0.01)
                step(0, 0)
        except CalledOff:
            time.sleep(0.1)
            ended.set()
            raise

    running = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(begun.wait, 5)
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()  # twice: it must still wait
    await asyncio.wait({running}, timeout=5)
    assert running.cancelled()
    assert ended.is_set()
