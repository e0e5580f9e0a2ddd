"""Our window against vLLM's own `reload_weights`, interleaved in one live engine.

    python -m benchmarks.swap --json [--quick]

A user without Hotweights calls `reload_weights` with a folder on disk; here its files are in the page cache. Ours is
the window as the controller opens it: pause, apply, reading back, caches, resume. The image was prepared before the
pause, which `prepare_s` tells, and all of it is fingerprinted after it: `prove_s`. Each run goes to the other of two
checkpoints.

Figures without a prefix, and both ratios, are of the default route; those with `reload_route_` are of the same window
when nothing can be made ready beforehand (HOTWEIGHTS_ROUTE=reload). `first_` figures are of the very
first swap of the process, which the medians leave out.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.live import Server, Windows
from benchmarks.report import Report, progress

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from random_llama import make_checkpoint

RUNS, RUNS_QUICK = 15, 7
WARM_UP = 2


async def our_swap(windows: Windows, folder: Path, base: Path) -> tuple[float, dict[str, Any], Any]:
    """Seconds of the preparation, what the rank said of it, and the window's result."""
    prepared_s, answer = await windows.prepare(folder, base)
    result = await windows.open(str(folder))
    await windows.release()
    return prepared_s, answer, result


def reload(server: Server, folder: Path) -> float:
    """Seconds of vLLM's own way."""
    start = time.perf_counter()
    server.call(server.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
    return time.perf_counter() - start


def window_times(server: Server, windows: Windows, folder: Path, base: Path, route: str) -> dict[str, float]:
    """Seconds of the parts of one swap of ours."""
    server.call(server.llm.collective_rpc("benchmark_route", args=(route,)))
    prepared_s, prepared, result = asyncio.run(our_swap(windows, folder, base))
    times, answer = result.times, result.answers[0]
    if bool(prepared["routes"]["reload"][0]) != (route == "reload"):
        raise RuntimeError(f"the routes were {prepared['routes']}")
    quiesce, apply, resume = (ms / 1000 for ms in (times.quiesce_ms, times.apply_ms, times.resume_ms))
    return {
        "prepare": prepared_s,
        "quiesce": quiesce,
        "apply": apply,
        "write": answer["write_ms"] / 1000,
        "proof": answer["proof_ms"] / 1000,
        "resume": resume,
        "prove": times.prove_ms / 1000,
        "pause": quiesce + apply + resume,
    }


def measure(server: Server, disk: list[Path], staged: list[Path], runs: int) -> dict[str, list[float]]:
    """Seconds of every part, one entry a run. The three ways take turns in one engine."""
    windows = Windows(server)
    taken: dict[str, list[float]] = {}
    for run in range(-WARM_UP, runs):
        # The engine has disk[0]; there, back and there, so that each way writes what the engine does not have.
        ours = window_times(server, windows, staged[1], staged[0], "auto")
        one = {**ours, "reload": reload(server, disk[0])}
        by_reload = window_times(server, windows, staged[1], staged[0], "reload")
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
            server.close()
        finally:
            shutil.rmtree(staging)
    report = Report("swap", runs)
    for part, seconds in taken.items():
        report.median(f"{part}_s", seconds, "s")
    report.ratio("apply_time", taken["apply"], taken["reload"])
    report.ratio("pause_time", taken["pause"], taken["reload"])
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
