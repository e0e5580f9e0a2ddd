"""The gate on a core in memory: calls of the owner in every order around a window. Real cores: test_vllm_gate."""

import enum
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from hotweights.adapters.vllm_core import Gate


class PauseState(enum.IntEnum):
    """As vLLM's."""

    UNPAUSED = 0
    PAUSED_NEW = 1
    PAUSED_ALL = 2


class Scheduler:
    def __init__(self) -> None:
        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state


class Core:
    """Pauses, sleeps and wakes as vLLM's does, at once or when `rest` is called."""

    def __init__(self, *, kv_connector: bool = False) -> None:
        self.scheduler = Scheduler()
        self.model_executor = SimpleNamespace(is_sleeping=False)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(is_multimodal_model=False),
            kv_transfer_config=SimpleNamespace(kv_connector="OffloadingConnector") if kv_connector else None,
        )
        self.busy = False
        self.done: list[str] = []
        self._resting: list[tuple[Future[Any], Callable[[], None]]] = []
        self.gate = Gate(self)

    # What vLLM does.

    def pause_scheduler(self, mode: str, clear_cache: bool) -> Any:
        state = PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW
        self.scheduler.set_pause_state(state)
        self.done.append(f"pause {mode}")
        return self._when_idle(lambda: None) if self.busy and mode == "wait" else None

    def resume_scheduler(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        self.done.append("resume")

    def reset_prefix_cache(self, running: bool, connector: bool) -> bool:
        return True

    def _fall_asleep(self) -> None:
        self.model_executor.is_sleeping = True
        self.done.append("asleep")

    def _sleep(self) -> Any:
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        if self.busy:
            return self._when_idle(self._fall_asleep)
        self._fall_asleep()
        return None

    def _wake_up(self) -> bool:
        self.model_executor.is_sleeping = False
        self.done.append("awake")
        self.resume()
        return True

    def _when_idle(self, then: Callable[[], None]) -> Any:
        future: Future[Any] = Future()
        self._resting.append((future, then))
        return future

    def rest(self) -> None:
        """The last request ends."""
        self.busy = False
        for future, then in self._resting:
            then()
            future.set_result(None)
        self._resting.clear()

    # What its owner asks for, as the plugin has it.

    def pause(self, mode: str) -> Any:
        return self.gate.of_owner("pause_scheduler", lambda: self.pause_scheduler(mode, True))

    def resume(self) -> Any:
        return self.gate.of_owner("resume_scheduler", self.resume_scheduler)

    def sleep(self, level: int = 1) -> Any:
        return self.gate.of_owner("sleep", self._sleep, level)

    def wake_up(self) -> Any:
        return self.gate.of_owner("wake_up", self._wake_up)

    @property
    def asleep(self) -> bool:
        return bool(self.model_executor.is_sleeping)

    @property
    def state(self) -> PauseState:
        return self.scheduler.pause_state


@pytest.fixture
def core() -> Core:
    return Core()


def sent(answer: Any) -> Any:
    """What vLLM does with an answer: it sends it, a future's when that is settled."""
    if isinstance(answer, Future):
        answer.add_done_callback(lambda done: None)
        return answer.result(0)
    return answer


def held_awake(core: Core) -> Any:
    """The core woken by its owner, held for a window; the owner's answer."""
    core.sleep()
    wakes = core.gate.await_wake()
    answer = core.wake_up()
    assert wakes.done()
    assert not answer.done()
    assert not core.asleep
    assert core.state is not PauseState.UNPAUSED
    return answer


@pytest.mark.parametrize("call", ["sleep", "wake_up", "resume"])
def test_nothing_of_the_owner_comes_between_the_wake_and_its_window(core: Core, call: str) -> None:
    answer = held_awake(core)
    core.gate.read(True)
    waits = getattr(core, call)()
    assert not waits.done()
    core.gate.read(False)
    assert sent(core.gate.enter("recompute"))["ok"]
    assert core.state is not PauseState.UNPAUSED
    assert sent(core.gate.leave(""))["resumed"]
    assert answer.done()
    assert waits.done()
    assert core.asleep == (call == "sleep")


def test_a_pause_while_a_wake_is_held_outlives_the_window(core: Core) -> None:
    held_awake(core)
    waits = core.pause("keep")
    assert sent(core.gate.enter("recompute"))["ok"]
    sent(core.gate.leave(""))
    assert waits.done()
    assert core.state is PauseState.PAUSED_ALL


def test_what_waited_for_a_held_wake_is_done_when_no_window_comes(core: Core) -> None:
    answer = held_awake(core)
    waits = core.sleep()
    sent(core.gate.let_wake())
    assert answer.done()
    assert waits.done()
    assert core.asleep


@pytest.mark.parametrize("mode", ["drain", "abort", "recompute", "keep"])
def test_what_its_owner_holds_still_is_neither_run_on_nor_aborted(core: Core, mode: str) -> None:
    core.pause("keep")
    core.busy = True
    assert sent(core.gate.enter(mode)) == {"ok": True, "reason": "", "paused": True}
    assert core.done == ["pause keep", "pause keep"]
    assert not sent(core.gate.leave(""))["resumed"]
    assert core.state is PauseState.PAUSED_ALL


def test_an_engine_that_falls_asleep_is_read_no_longer(core: Core) -> None:
    core.busy = True
    core.sleep(2)
    assert core.gate.read(True)["asleep"] == 2
    wakes = core.gate.await_wake()
    core.rest()
    assert core.asleep
    core.wake_up()
    assert wakes.done()


def test_a_pause_that_was_taken_back_is_waited_for_no_longer(core: Core) -> None:
    core.busy = True
    core.pause("wait")
    core.resume()
    assert core.gate.enter("recompute")["ok"]


def test_a_window_answers_before_the_sleep_that_waited_for_it(core: Core) -> None:
    core.gate.enter("recompute")
    core.sleep()
    answer = core.gate.leave("")
    seen: list[bool] = []
    answer.add_done_callback(lambda done: seen.append(core.asleep))
    assert seen == [False]
    assert core.asleep


def test_the_level_of_a_sleep_is_forgotten_on_waking(core: Core) -> None:
    core.sleep(2)
    core.wake_up()
    core.gate.of_owner("release_kv_cache_memory", core._fall_asleep)
    assert core.gate.state()["asleep"] == 1


def test_keep_is_refused_where_a_connector_knows_blocks_by_their_old_names() -> None:
    core = Core(kv_connector=True)
    assert "KV connector" in core.gate.enter("keep")["reason"]
    assert core.gate.enter("recompute")["ok"]
