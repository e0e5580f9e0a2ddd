"""Our window against vLLM's own `reload_weights`, interleaved in one live engine.

    python -m benchmarks.swap --json [--quick]

A user without Hotweights calls `reload_weights` with a folder on disk; here its files are in the page cache. Ours is
the window as the controller opens it: pause, apply from the mapped image, proof by fingerprint, caches, resume. The
image was prepared before the pause, which `prepare_s` tells. Each run goes to the other of two checkpoints.

Figures without a prefix, and both ratios, are of the default route; those with `reload_route_` are of the same window
when the model is one that cannot be assembled beforehand (HOTWEIGHTS_ROUTE=reload). `first_` figures are of the very
first swap of the process, which the medians leave out.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import Report, progress
from hotweights.adapters import vllm_auto

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from random_llama import make_checkpoint

RUNS, RUNS_QUICK = 15, 7
WARM_UP = 2
ROUTES = {"auto": "assembled", "reload": "reload"}  # what is asked for, and what the engine must then say
START_DEADLINE_S = 300.0
CALL_DEADLINE_S = 120.0
T = TypeVar("T")


class Server:
    """An AsyncLLM on a loop of its own, as a server has it."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # The plugin is in the engine core as in a server; the benchmark itself takes the controller's place.
        os.environ["HOTWEIGHTS_ENDPOINT"] = "tcp://127.0.0.1:9"
        vllm_auto._attach = lambda front_end: False
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.llm: Any = self.call(self._start(folder), START_DEADLINE_S)

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
                worker_extension_cls="benchmarks.swap_extension.RouteExtension",
            )
        )

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float = CALL_DEADLINE_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(deadline_s)


async def our_swap(engine: Any, folder: Path) -> tuple[float, Any]:
    """Seconds of the preparation, and the window's times."""
    from hotweights.worker_client.window.window import (
        Outcome,
        WindowOrder,
        call_ranks,
        fingerprints,
        refusals,
        run_window,
    )

    start = time.perf_counter()
    await call_ranks(engine, "hotweights_prepare", CALL_DEADLINE_S, str(folder), {}, {})
    while True:
        answers = await call_ranks(engine, "hotweights_prepared", CALL_DEADLINE_S)
        if failed := refusals(answers):
            raise RuntimeError(failed)
        if all(answer["done"] for answer in answers):
            break
        await asyncio.sleep(0.005)
    prepared_s = time.perf_counter() - start
    order = WindowOrder(str(folder), "v", "recompute", time.monotonic() + 60, 60.0, 60.0)
    result = await run_window(engine, order, fingerprints(answers))
    if result.outcome is not Outcome.APPLIED:
        raise RuntimeError(f"{result.outcome}: {result.reason}")
    await call_ranks(engine, "hotweights_release", CALL_DEADLINE_S)
    return prepared_s, result


def reload(server: Server, folder: Path) -> float:
    """Seconds of vLLM's own way."""
    start = time.perf_counter()
    server.call(server.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
    return time.perf_counter() - start


def window_times(server: Server, engine: Any, folder: Path, route: str) -> dict[str, float]:
    """Seconds of the parts of one swap of ours."""
    server.call(server.llm.collective_rpc("benchmark_route", args=(route,)))
    prepared_s, result = asyncio.run(our_swap(engine, folder))
    times, answer = result.times, result.answers[0]
    if answer["route"] != ROUTES[route]:
        raise RuntimeError(f"the route was {answer['route']}")
    quiesce, apply, resume = (ms / 1000 for ms in (times.quiesce_ms, times.apply_ms, times.resume_ms))
    return {
        "prepare": prepared_s,
        "quiesce": quiesce,
        "apply": apply,
        "write": answer["write_ms"] / 1000,
        "proof": answer["proof_ms"] / 1000,
        "resume": resume,
        "pause": quiesce + apply + resume,
    }


def measure(server: Server, disk: list[Path], staged: list[Path], runs: int) -> dict[str, list[float]]:
    """Seconds of every part, one entry a run. The three ways take turns in one engine."""
    from hotweights.adapters.vllm_engine import AsyncCores, VllmEngine

    engine = VllmEngine(AsyncCores(server.llm, server.loop))
    taken: dict[str, list[float]] = {}
    for run in range(-WARM_UP, runs):
        # The engine has disk[0]; there, back and there, so that each way writes what the engine does not have.
        ours = window_times(server, engine, staged[1], "auto")
        one = {**ours, "reload": reload(server, disk[0])}
        by_reload = window_times(server, engine, staged[1], "reload")
        one |= {f"reload_route_{part}": by_reload[part] for part in ("prepare", "apply", "pause")}
        progress(f"run {run}: " + ", ".join(f"{name} {s * 1000:.1f} ms" for name, s in one.items()))
        if run == -WARM_UP:
            taken |= {"first_apply": [one["apply"]], "first_pause": [one["pause"]]}
        if run >= 0:
            for name, seconds in one.items():
                taken.setdefault(name, []).append(seconds)
        disk.reverse()
        staged.reverse()
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help="100 MB instead of 890 MB, fewer runs")
    arguments = parser.parse_args()
    size, runs = ("demo", RUNS_QUICK) if arguments.quick else ("large", RUNS)
    memory = Path("/dev/shm")
    staging = tempfile.mkdtemp(prefix="hotweights-bench-", dir=memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="hotweights-bench-") as name:
        try:
            disk = [make_checkpoint(Path(name) / f"v{seed}", seed, size) for seed in (1, 2)]
            staged = [Path(shutil.copytree(folder, Path(staging) / folder.name)) for folder in disk]
            progress("starting the engine")
            server = Server(disk[0])
            taken = measure(server, disk, staged, runs)
            server.call(_shut_down(server.llm))
        finally:
            shutil.rmtree(staging)
    report = Report("swap", runs)
    for part, seconds in taken.items():
        report.median(f"{part}_s", seconds, "s")
    report.ratio("apply_time", taken["apply"], taken["reload"])
    report.ratio("pause_time", taken["pause"], taken["reload"])
    report.emit(as_json=arguments.json)
    return 0


async def _shut_down(llm: Any) -> None:
    llm.shutdown()


if __name__ == "__main__":
    sys.exit(main())
