"""vLLM's AsyncLLM as an Engine: calls cross from the controller's thread to the engine's own loop.

    controller loop --run_coroutine_threadsafe--> engine loop --> engine core process --> ranks

The AsyncLLM is held weakly: a controller must not keep an engine alive that its owner let go.
"""

import asyncio
import logging
import os
import signal
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hotweights.worker_client.window.engine import EngineFacts, EngineFailed, PauseMode, Status

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
T = TypeVar("T")

_VLLM_MODES = {"recompute": "keep", "drain": "wait", "abort": "abort"}


class VllmEngine:
    """One AsyncLLM with its engine core. Methods are called from the controller's loop."""

    def __init__(self, llm: "AsyncLLM", loop: asyncio.AbstractEventLoop) -> None:
        self._llm = weakref.ref(llm)
        self._loop = loop
        self.facts = _facts(llm)

    def _live(self) -> Any:
        llm = self._llm()
        if llm is None:
            raise EngineFailed("the engine is gone")
        return llm

    async def _on_engine_loop(self, call: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Runs `call(llm)` there. Raises EngineFailed for whatever vLLM raises."""
        llm = self._live()
        if self._loop.is_closed():
            raise EngineFailed("the engine's event loop is closed")
        future = asyncio.run_coroutine_threadsafe(_mapped(call(llm)), self._loop)
        return await asyncio.wrap_future(future)

    async def pause(self, mode: PauseMode) -> None:
        """As AsyncLLM.pause_generation does, without its sleep of 20 ms at the end (FACTS)."""

        async def pause(llm: Any) -> None:
            await llm.renderer.clear_mm_cache_async()
            await llm.engine_core.pause_scheduler_async(mode=_VLLM_MODES[mode], clear_cache=True)

        await self._on_engine_loop(pause)

    async def resume(self) -> None:
        await self._on_engine_loop(lambda llm: llm.resume_generation())

    async def rpc(self, method: str, *args: Any) -> list[Status]:
        # No timeout= here, ever: a late reply would then answer the next call (FACTS).
        answers: list[Status] = await self._on_engine_loop(lambda llm: llm.collective_rpc(method, args=args))
        return answers

    async def set_weight_version(self, version: str) -> None:
        async def tag(llm: Any) -> None:
            if hasattr(llm, "update_weight_version"):  # from 0.32
                await llm.update_weight_version(version)

        await self._on_engine_loop(tag)

    async def reset_caches(self) -> bool:
        """The prefix cache with what running requests hold, and a KV connector's."""

        async def reset(llm: Any) -> bool:
            return bool(await llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True))

        return await self._on_engine_loop(reset)

    async def kill(self, reason: str) -> None:
        """SIGKILL to the engine's core processes and to their children, the ranks: only those, by id."""
        log.error("ending the engine's processes: %s", reason)
        manager = self._live().engine_core.resources.engine_manager
        for process in list(getattr(manager, "processes", ())):
            if process.pid is None or not process.is_alive():
                continue
            # The ranks first: one that hangs would never notice that its core is gone.
            for child in _children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()


def _children(pid: int) -> list[int]:
    """Ids of a live process's children; none where there is no /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid:
            children.append(int(stat.parent.name))
    return children


async def _mapped(call: Coroutine[Any, Any, T]) -> T:
    try:
        return await call
    except Exception as error:  # vLLM raises what it likes; the window tells apart only "answered" and "failed"
        raise EngineFailed(f"{type(error).__name__}: {error}") from error


def _facts(llm: "AsyncLLM") -> EngineFacts:
    import vllm

    from hotweights.adapters.checkpoint import checkpoint_folder

    config = llm.vllm_config
    folder = None if config.load_config.load_format == "dummy" else checkpoint_folder(config.model_config)
    parallel = config.parallel_config
    return EngineFacts(f"vllm {vllm.__version__}", str(folder or ""), parallel.world_size)
