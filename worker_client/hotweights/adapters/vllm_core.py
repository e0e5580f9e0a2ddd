"""The gate in vLLM's engine core: where our window meets what the engine's owner wants of the same scheduler.

    front ends (any number) --utility calls--> EngineCore's loop --> Gate --> scheduler, executor

Every front end of an engine reaches it through the one loop of its core: here they can be kept apart.

- while a window is open, a pause, resume, sleep or wake of others waits and is done when it closes;
- an engine that its owner has paused is written in place and stays paused;
- an engine that is asleep is not touched; it can be held when it wakes, so that the write comes before the next step;
- while ranks read parameters (preparing, fingerprints) it does not fall asleep;
- with `keep`, requests that come after the window get a salt, so that they never meet blocks of the old weights.

The plugin sets these methods on `EngineCore`; it runs in the core's process before the engine is built. Everything here
runs on the core's own loop, one call at a time.
"""

import dataclasses
import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hotweights.adapters.processes import end_with_parent, process

log = logging.getLogger(__name__)

WAITING_MAX = 256
_GATE = "_hotweights_gate"
_WRAPPED = "_hotweights_wrapped"
_OWNERS_CALLS = ("pause_scheduler", "resume_scheduler", "sleep", "wake_up", "release_kv_cache_memory")
_VLLM_MODES = {"recompute": "keep", "drain": "wait", "abort": "abort", "keep": "keep"}


class Gate:
    """Of one engine core."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._ours = False
        self._open = False
        self._entering: Future[Any] | None = None
        self._reading = False
        self._serial = 0
        self._owners_state: Any = None
        self._owners_rest: tuple[str, Future[Any]] | None = None
        self._waiting: deque[tuple[str, Callable[[], Any], Future[Any]]] = deque()
        self._level = 0
        self._wake_wanted: Future[Any] | None = None
        self._woken: tuple[Future[Any], Any] | None = None
        self._no_resume = False
        self.salt = ""

    # The owner's calls.

    def of_owner(self, name: str, call: Callable[[], Any], level: int = 0) -> Any:
        """Does a call of the engine's owner, or gives a future of it where it has to wait."""
        if self._ours:
            return None if name == "resume_scheduler" and self._no_resume else call()
        if self._must_wait(name) or self._waiting:
            if len(self._waiting) >= WAITING_MAX:
                raise RuntimeError(f"{WAITING_MAX} calls wait for the open weight update already")
            log.info("%s waits for the weight update", name)
            waits: Future[Any] = Future()
            self._waiting.append((name, functools.partial(self._of_owner_now, name, call, level), waits))
            return waits
        return self._of_owner_now(name, call, level)

    def _must_wait(self, name: str) -> bool:
        return self._open or self._woken is not None or (self._reading and name == "sleep")

    def _of_owner_now(self, name: str, call: Callable[[], Any], level: int) -> Any:
        if name == "wake_up" and self._wake_wanted is not None and self.asleep:
            return self._held_wake(call)
        if name == "sleep" and level:
            self._level = level
        result = self._as_ours(call)  # what it calls in turn is part of it
        if name in ("pause_scheduler", "sleep") and isinstance(result, Future):
            self._owners_rest = name, result
        elif name in ("resume_scheduler", "wake_up"):
            if self._owners_rest is not None and self._owners_rest[0] == "pause_scheduler":
                self._owners_rest = None  # vLLM settles it at the next idle moment, and nobody wants that rest now
            self._note_awake()
        return result

    def _note_awake(self) -> None:
        if not (self.asleep or self._falls_asleep):
            self._level = 0

    def _as_ours(self, call: Callable[[], Any], *, resume: bool = True) -> Any:
        before = self._ours, self._no_resume
        self._ours, self._no_resume = True, not resume
        try:
            return call()
        finally:
            self._ours, self._no_resume = before

    def _held_wake(self, call: Callable[[], Any]) -> Any:
        """Wakes the memory but not the scheduler: the window comes first, then the owner's answer."""
        result = self._as_ours(call, resume=False)
        wanted = self._wake_wanted
        if self.asleep or wanted is None:
            return result
        answer: Future[Any] = Future()
        self._woken, self._wake_wanted = (answer, result), None
        self._note_awake()
        wanted.set_result(self.state())
        return answer

    def _do_waiting(self) -> None:
        while self._waiting and not self._must_wait(self._waiting[0][0]):
            _, call, waits = self._waiting.popleft()
            _settle(waits, call)

    # What a controller asks.

    @property
    def asleep(self) -> bool:
        return bool(self._core.model_executor.is_sleeping)

    def state(self) -> dict[str, Any]:
        """Which process this is, and whether its owner has it asleep: the level, 0 is awake."""
        return {"asleep": self._sleep_level(), "process": dataclasses.astuple(process(os.getpid()))}

    @property
    def _falls_asleep(self) -> bool:
        """Whether its owner has put it to sleep, which waits for requests."""
        return self._owners_rest is not None and self._owners_rest[0] == "sleep" and not self._owners_rest[1].done()

    def _sleep_level(self) -> int:
        return (self._level or 1) if self.asleep or self._falls_asleep else 0

    def read(self, begin: bool) -> Any:
        """Ranks begin or end to read parameters. Asleep, nothing begins."""
        self._reading = begin and not self._sleep_level()
        return self._answered(self.state())

    def await_wake(self) -> Any:
        """A future of the wake-up, after which the scheduler still rests: open a window, or let it go on."""
        if not self._sleep_level():
            return self.state()
        self._wake_wanted = self._wake_wanted or Future()
        return self._wake_wanted

    def let_wake(self) -> Any:
        """No window is wanted on waking any longer; one that is held goes on."""
        wanted, self._wake_wanted = self._wake_wanted, None
        if wanted is not None:
            wanted.set_result(self.state())
        self._end_held_wake()
        return self._answered(self.state())

    def _end_held_wake(self) -> None:
        if self._woken is not None:
            (answer, result), self._woken = self._woken, None
            if not self._open:
                self._as_ours(self._core.resume_scheduler)
            answer.set_result(result)

    # The window.

    def enter(self, mode: str) -> Any:
        """Opens the window: {"ok", "reason", "paused"}, or a future of it, once no step runs and caches are dropped.

        `paused` tells that the owner had paused the engine. Not ok: no window is open, and nothing was changed.
        """
        entered: Future[Any] = Future()
        self._entering = entered
        rests = self._owners_rest[1] if self._owners_rest is not None else None
        if rests is None or rests.done():
            return self._enter_now(mode)
        # The owner's pause or sleep is on its way and waits for requests, which our pause would stop.
        rests.add_done_callback(lambda _: _settle(entered, lambda: self._enter_late(entered, mode)))
        return entered

    def _enter_late(self, entered: "Future[Any]", mode: str) -> Any:
        return self._enter_now(mode) if self._entering is entered else self._refused("the window was given up")

    def _enter_now(self, mode: str) -> Any:
        if reason := self._closed_for(mode):
            return self._refused(reason)
        state = self._core.scheduler.pause_state
        # Woken for this window: its owner wants it to run.
        self._owners_state = type(state).UNPAUSED if self._woken is not None else state
        # What its owner holds still, requests and all, is neither run on nor aborted.
        how = "keep" if self._owners_state == type(state).PAUSED_ALL else _VLLM_MODES[mode]
        self._open, self._serial = True, self._serial + 1
        try:
            pausing = self._as_ours(lambda: self._core.pause_scheduler(how, False))
        except BaseException:
            self._open = False
            raise
        if not isinstance(pausing, Future):
            return self._entered(mode, self._serial)
        serial, entered = self._serial, Future[Any]()
        pausing.add_done_callback(lambda done: _settle(entered, lambda: done.result() or self._entered(mode, serial)))
        return entered

    def _closed_for(self, mode: str) -> str:
        """Why no window can be opened; empty when one can."""
        if self._open:
            return "a window is open already"
        if self.asleep:
            return "the engine is asleep"
        config = self._core.vllm_config
        if mode == "keep" and config.kv_transfer_config is not None:
            # It knows requests in flight by the names that their blocks had before the salt.
            return "inflight=keep is not for engines with a KV connector; take recompute, drain or abort"
        if mode == "keep" and config.model_config.is_multimodal_model:
            # Requests in flight would go on over what an encoder computed with the old weights.
            return "inflight=keep is for text models only; take recompute, drain or abort"
        return ""

    def _entered(self, mode: str, serial: int) -> dict[str, Any]:
        if not self._open or serial != self._serial:
            return self._refused("the window was given up")
        if mode != "keep" and not self.reset():
            return {"ok": False, "reason": "a cache is still held by requests", "paused": self._owners_pause}
        return {"ok": True, "reason": "", "paused": self._owners_pause}

    def _refused(self, reason: str) -> dict[str, Any]:
        return {"ok": False, "reason": reason, "paused": False}

    @property
    def _owners_pause(self) -> bool:
        return bool(self._owners_state)

    def reset(self) -> bool:
        """Drops what was computed with other weights, that of running requests too: they are computed anew."""
        done = bool(self._core.reset_prefix_cache(True, True))
        if self._core.vllm_config.model_config.is_multimodal_model:
            self._core.reset_encoder_cache()
        return done

    def leave(self, salt: str) -> Any:
        """Closes the window, if one is open. The scheduler goes on, unless the owner had paused it.

        A `salt` names the weights that new requests must not share blocks across; "" leaves names as they are.
        """
        self._entering = None
        if not self._open:
            return {"resumed": False}
        if salt:
            self.salt = f"{salt}#{self._serial}"
            for request in _not_begun(self._core.scheduler):
                self.salted(request)
        self._open = False
        if self._owners_pause:
            self._core.scheduler.set_pause_state(self._owners_state)
        else:
            self._as_ours(self._core.resume_scheduler)
        resumed = not self._owners_pause
        self._end_held_wake()
        return self._answered({"resumed": resumed})

    def _answered(self, answer: dict[str, Any]) -> Any:
        """The answer; where calls of the owner have waited for it, they are done after it: a sleep takes its time."""
        return _AnsweredFirst(answer, self._do_waiting) if self._waiting else answer

    def salted(self, request: Any) -> None:
        """The request's blocks get other names than those of the weights before; its own salt still counts."""
        if not self.salt:
            return
        own = request.__dict__.setdefault("_hotweights_own_salt", request.cache_salt or "")
        request.cache_salt = f"{self.salt}:{own}"
        request.block_hashes.clear()
        request.update_block_hashes()


class _AnsweredFirst(Future[Any]):
    """An answer that is on its way before `then` begins: vLLM sends a future's from the callback it adds."""

    def __init__(self, answer: dict[str, Any], then: Callable[[], None]) -> None:
        super().__init__()
        self.set_result(answer)
        self._then = then

    def add_done_callback(self, fn: Callable[[Future[Any]], Any]) -> None:
        super().add_done_callback(fn)
        self._then()


def _settle(waits: "Future[Any]", call: Callable[[], Any]) -> None:
    """Gives `waits` what the call gives, now or later.

    The one place here that catches everything: the exception belongs to whoever made the call.
    """
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - carried to the caller
        waits.set_exception(error)
        return
    if isinstance(result, Future):
        result.add_done_callback(lambda done: _settle(waits, done.result))
    else:
        waits.set_result(result)


def _not_begun(scheduler: Any) -> list[Any]:
    """Requests that hold no computed blocks yet."""
    queues = [getattr(scheduler, name, ()) for name in ("waiting", "kv_holding_waiting", "skipped_waiting")]
    return [request for request in itertools.chain(*queues) if request.num_computed_tokens == 0]


def gate_of(core: Any) -> Gate:
    """The core's gate; made when it is first asked for, in the core's process."""
    gate: Gate | None = core.__dict__.get(_GATE)
    if gate is None:
        gate = core.__dict__[_GATE] = Gate(core)
        end_with_parent()
    return gate


def install() -> None:
    """Sets the gate's methods on vLLM's engine cores; again does nothing new."""
    from vllm.v1.engine import core

    base = core.EngineCore
    if _WRAPPED in base.__dict__:
        return
    base.hotweights_state = lambda self: gate_of(self).state()
    base.hotweights_read = lambda self, begin: gate_of(self).read(begin)
    base.hotweights_await_wake = lambda self: gate_of(self).await_wake()
    base.hotweights_let_wake = lambda self: gate_of(self).let_wake()
    base.hotweights_enter = lambda self, mode: gate_of(self).enter(mode)
    base.hotweights_reset = lambda self: gate_of(self).reset()
    base.hotweights_leave = lambda self, salt: gate_of(self).leave(salt)
    for cls in [base, *_subclasses(base)]:
        for name in _OWNERS_CALLS:
            if name in cls.__dict__:
                setattr(cls, name, _of_owner(name, cls.__dict__[name]))
    base.add_request = _salting(base.add_request)
    setattr(base, _WRAPPED, True)


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    direct: list[type[Any]] = cls.__subclasses__()
    return [found for one in direct for found in (one, *_subclasses(one))]


def _of_owner(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        level = int(kwargs.get("level", args[0] if args else 1)) if name == "sleep" else 0
        return gate_of(self).of_owner(name, functools.partial(method, self, *args, **kwargs), level)

    return call


def _salting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        gate_of(self).salted(request)
        return method(self, request, *args, **kwargs)

    return add_request
