"""A vLLM engine as the window's Engine, whatever its front end: AsyncLLM, the OpenAI server, or an offline LLM.

    controller loop --Cores--> engine core 0 .. n (each with its ranks)
                       |
       AsyncCores: on the front end's own loop        SyncCores: beside the thread that steps an LLM

Every call goes to every engine core and every core's answer is looked at: vLLM's own data parallel client passes on
the first one only (FACTS). Front ends are held weakly: a controller must not keep an engine that its owner let go.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import uuid
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hotweights.adapters.processes import children, is_alive
from hotweights.worker_client.window.engine import EngineFacts, EngineFailed, PauseMode, Process, Status

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

log = logging.getLogger(__name__)
T = TypeVar("T")

DEATH_POLL_S = 0.2
TORN = "_hotweights_torn"
SEND_LOCK = "_hotweights_send_lock"


class Cores(Protocol):
    """The engine cores behind one front end."""

    @property
    def front_end(self) -> Any:
        """The front end. Raises EngineFailed when it is gone."""

    async def call(self, method: str, *args: Any) -> list[Any]:
        """The utility method on every core, in the order of the cores. Raises EngineFailed for whatever vLLM raises."""


class AsyncCores:
    """Of an AsyncLLM: its client belongs to its loop. Called from the controller's loop."""

    def __init__(self, llm: "AsyncLLM", loop: asyncio.AbstractEventLoop) -> None:
        self._held = weakref.ref(llm)
        self._loop = loop

    @property
    def front_end(self) -> Any:
        return _live(self._held)

    async def call(self, method: str, *args: Any) -> list[Any]:
        client = self.front_end.engine_core
        if self._loop.is_closed():
            raise EngineFailed("the engine's event loop is closed")

        async def every_core() -> list[Any]:
            calls = [client._call_utility_async(method, *args, engine=engine) for engine in client.core_engines]
            return list(await asyncio.gather(*calls))

        return await _answer(asyncio.run_coroutine_threadsafe(_mapped(every_core()), self._loop), client)


class SyncCores:
    """Of the LLMEngine in an offline LLM: its owner's thread may be waiting for outputs meanwhile.

    Only the sending is locked; a lock over a step would wait for outputs that a paused engine never gives (FACTS).
    """

    def __init__(self, llm: "LLMEngine") -> None:
        self._held = weakref.ref(llm)

    @property
    def front_end(self) -> Any:
        return _live(self._held)

    async def call(self, method: str, *args: Any) -> list[Any]:
        from vllm.v1.engine import EngineCoreRequestType

        client = self.front_end.engine_core
        call_id = uuid.uuid1().int >> 64  # as vLLM makes them: unique, and within msgpack's 64 bits
        future: Future[Any] = Future()
        client.utility_results[call_id] = future
        try:
            await asyncio.to_thread(client._send_input, EngineCoreRequestType.UTILITY, (0, call_id, method, args))
        except Exception as error:
            raise _failed(error) from error
        return [await _answer(future, client)]


def lock_sending(client_class: type[Any]) -> None:
    """Lets two threads send over one SyncMPClient. Again does nothing new."""
    send = client_class._send_input
    if getattr(send, SEND_LOCK, False):
        return

    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__.setdefault(SEND_LOCK, threading.Lock()):
            return send(self, *args, **kwargs)

    setattr(locked, SEND_LOCK, True)
    client_class._send_input = locked


class VllmEngine:
    """One vLLM engine. Methods are called from the controller's loop."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self.facts = _facts(cores.front_end)

    async def cores(self) -> list[Process]:
        return [Process(*state["process"]) for state in await self._cores.call("hotweights_state")]

    async def pause(self, mode: PauseMode) -> None:
        answers = await self._cores.call("hotweights_enter", mode)
        if refused := {answer["reason"] for answer in answers if not answer["ok"]}:
            raise EngineFailed("; ".join(sorted(refused)))

    async def resume(self, salt: str) -> bool:
        answers = await self._cores.call("hotweights_leave", salt)
        return all(answer["resumed"] for answer in answers)

    async def rpc(self, method: str, *args: Any) -> list[Status]:
        # No timeout here, ever: a late reply would then answer the next call (FACTS).
        of_cores = await self._cores.call("collective_rpc", method, None, args, None)
        per_core = self.facts.rank_count // len(of_cores)
        # A rank's number begins anew in each core.
        return [
            {**status, "rank": at * per_core + int(status["rank"])} if isinstance(status, dict) else {}
            for at, statuses in enumerate(of_cores)
            for status in statuses
        ]

    async def set_weight_version(self, version: str) -> None:
        from vllm.v1.engine.core import EngineCore

        if hasattr(EngineCore, "set_weight_version"):  # all of 0.28 to 0.32 have it
            await self._cores.call("set_weight_version", version)

    async def reset_caches(self) -> bool:
        """The prefix cache with what running requests hold, a KV connector's, and encoders' outputs."""
        return all(await self._cores.call("hotweights_reset"))

    async def read(self, begin: bool) -> int:
        return max(int(state["asleep"]) for state in await self._cores.call("hotweights_read", begin))

    async def await_wake(self) -> None:
        await self._cores.call("hotweights_await_wake")

    async def let_wake(self) -> None:
        await self._cores.call("hotweights_let_wake")

    async def kill(self, processes: Sequence[Process], reason: str) -> None:
        """SIGKILL to the ranks, the engine cores and their children: only those, by id."""
        log.error("ending the engine's processes: %s", reason)
        # The ranks first: one that hangs would never notice that its core is gone.
        for process in processes:
            if is_alive(process):
                for pid in (*children(process.pid), process.pid):
                    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                        os.kill(pid, signal.SIGKILL)

    def condemn(self, reason: str) -> None:
        setattr(self._cores.front_end, TORN, reason)


def _live(held: "weakref.ref[Any]") -> Any:
    front_end = held()
    if front_end is None:
        raise EngineFailed("the engine is gone")
    return front_end


async def _answer(future: "Future[T]", client: Any) -> T:
    """The answer. vLLM leaves calls to a core that died without one: that it died is looked for."""
    waits = asyncio.wrap_future(future)
    while not (await asyncio.wait({waits}, timeout=DEATH_POLL_S))[0]:
        if client.resources.engine_dead:
            waits.cancel()
            raise EngineFailed("the engine core is dead")
    try:
        return waits.result()
    except EngineFailed:
        raise
    except Exception as error:
        raise _failed(error) from error


async def _mapped(call: Coroutine[Any, Any, T]) -> T:
    try:
        return await call
    except Exception as error:  # vLLM raises what it likes; the window tells apart only "answered" and "failed"
        raise _failed(error) from error


def _failed(error: Exception) -> EngineFailed:
    return EngineFailed(f"{type(error).__name__}: {error}")


def _facts(llm: Any) -> EngineFacts:
    import vllm

    from hotweights.adapters.checkpoint import checkpoint_folder

    config, client = llm.vllm_config, llm.engine_core
    folder: Path | None = None
    if config.load_config.load_format != "dummy":
        folder = checkpoint_folder(config.model_config)
    cores = len(getattr(client, "core_engines", ())) or 1
    return EngineFacts(f"vllm {vllm.__version__}", str(folder or ""), cores * config.parallel_config.world_size)
