"""A live engine for benchmarks, with the benchmark in the controller's place."""

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hotweights.adapters import vllm_auto

START_DEADLINE_S = 300.0
CALL_DEADLINE_S = 120.0
POLL_S = 0.005
T = TypeVar("T")


class Server:
    """An AsyncLLM on a loop of its own, as a server has it."""

    def __init__(self, folder: Path, *, leave_a_core: bool = False) -> None:
        """`leave_a_core` keeps the engine off the first core: traffic on all of them starves other processes
        (`python -m benchmarks.starved`)."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # The plugin is in the engine core as in a server; the benchmark itself takes the controller's place.
        os.environ["HOTWEIGHTS_ENDPOINT"] = "tcp://127.0.0.1:9"
        vllm_auto._attach = lambda front_end: False
        self.loop = asyncio.new_event_loop()
        cores = os.sched_getaffinity(0)
        if leave_a_core and len(cores) > 1:  # threads and processes take it over from the thread that starts them
            os.sched_setaffinity(0, cores - {min(cores)})
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.llm: Any = self.call(self._start(folder), START_DEADLINE_S)
        os.sched_setaffinity(0, cores)

    @staticmethod
    async def _start(folder: Path) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder),
                enforce_eager=True,
                max_model_len=256,
                dtype="bfloat16",
                worker_extension_cls="benchmarks.live_extension.BenchmarkExtension",
            )
        )

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float = CALL_DEADLINE_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(deadline_s)

    def close(self) -> None:
        async def shut_down() -> None:
            self.llm.shutdown()

        self.call(shut_down())


class Windows:
    """Prepares and opens windows on the one rank of a server's engine."""

    def __init__(self, server: Server) -> None:
        from hotweights.adapters.vllm_engine import AsyncCores, VllmEngine
        from hotweights.worker_client.window.sleep import Sleep

        self._engine = VllmEngine(AsyncCores(server.llm, server.loop))
        self._sleep = Sleep(self._engine, lambda report: None, lambda: False, lambda: False)
        self._before: tuple[bytes, ...] = ()
        self._expected: tuple[bytes, ...] = ()

    async def _rank(self, method: str, *args: Any) -> dict[str, Any]:
        from hotweights.worker_client.window.window import call_ranks

        (answer,) = await call_ranks(self._engine, f"hotweights_{method}", CALL_DEADLINE_S, *args)
        return answer

    async def prepare(self, folder: Path, base: Path) -> tuple[float, dict[str, Any]]:
        """Seconds, and the rank's answer. `base` is the image that is installed."""
        begun = time.perf_counter()
        answer = await self._rank("prepare", str(folder), {}, {"base": str(base)})
        answer["done"] = False
        while answer["ok"] and not answer["done"]:
            answer = await self._rank("prepared")
            await asyncio.sleep(0 if answer.get("done") else POLL_S)
        if not answer["ok"]:
            raise RuntimeError(answer["reason"])
        self._before = (answer["fingerprint"],)
        self._expected = (answer["expected"],) if answer["expected"] else ()
        return time.perf_counter() - begun, answer

    async def open(self, folder: str, mode: Any = "recompute") -> Any:
        """The result of one; "" goes back."""
        from hotweights.worker_client.window.identify import prove
        from hotweights.worker_client.window.window import Outcome, WindowOrder, run_window

        expected = self._expected if folder else self._before
        order = WindowOrder(folder, "v", mode, time.monotonic() + 60, 60.0, 60.0, expected=expected)
        result = await run_window(self._engine, order, self._before, lambda: prove(self._engine, self._sleep, 60.0))
        if result.outcome is not Outcome.APPLIED or result.note:
            raise RuntimeError(f"{result.outcome}: {result.reason} {result.note}")
        return result

    async def release(self) -> None:
        """Drops what was prepared."""
        answer = {"ok": False}
        while not answer["ok"]:
            answer = await self._rank("release")
            await asyncio.sleep(0 if answer["ok"] else POLL_S)
