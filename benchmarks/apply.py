"""What a window writes, against a plain memcpy and against vLLM's own `reload_weights`, in one live engine.

    python -m benchmarks.apply --json [--quick]

The engine holds 890 MB of parameters (105 MB with --quick). Its linear layers are kept plain: on a CPU with AVX-512 or
AMX vLLM would pack them, and then their route is not this one (`python -m benchmarks.swap` measures that).

    full_time             the write of a version in which every weight differs, over a memcpy of as many bytes
    one_percent_time      the write of a version in which 1 % of the values of each weight differ, over the full write
    undo_time             taking the full write back, over the full write
    reload_speedup_full   `reload_weights` from a folder in the page cache, over our apply: write and reading back
    reload_speedup_1      likewise for the version of 1 %
    client_gap            the longest gap between a client's streamed tokens, over the pause as it was reported and a
                          decode step; the median of updates under traffic that goes on over the blocks it has
                          (`inflight=keep`). With `recompute`, medians `gap_recompute_...`, the first step after the
                          pause computes the request anew
    serving_share         tokens a second while a version is staged and prepared, over tokens a second undisturbed
    fetching_share        likewise while an agent fetches a version from another on the same machine, as fast as it can
    fetching_share_bandwidth_max  with --bandwidth-max of 100 MB/s, on both

What is measured under traffic is of an engine that leaves one core to others, as it has to on a machine with few of
them: with traffic on all, whoever asks it something was seen to starve for more than 10 s.

The write, the undo and their reading back are timed in the rank, everything else as a caller sees it. Places are read
back as they are written, which counts as the write; clearing the KV cache, which going back does, is apart. All parts
of a ratio are taken in turns in the same run.
"""

import argparse
import asyncio
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.distribute import distribute
from benchmarks.live import CALL_DEADLINE_S, Server, Windows
from benchmarks.report import Report, progress
from benchmarks.swap import reload

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from live_processes import Processes, free_port
from random_llama import make_checkpoint

RUNS, RUNS_QUICK = 11, 5
GAPS, GAPS_QUICK = 5, 3
WARM_UP = 1
STREAMS = 4
UNDISTURBED_S = 3.0
LIMIT = "100MB"
Seconds = dict[str, list[float]]


def one_percent_changed(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint in which 1 % of the values of every weight matrix, drawn at random, differ."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    torch.manual_seed(7)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.ndim > 1:
                values = tensor.view(-1).view(torch.int16)
                values[torch.randperm(values.numel())[: values.numel() // 100]] ^= (
                    1  # the last bit of the mantissa: another value, and never NaN
                )
        save_file(tensors, file, {"format": "pt"})
    return target


def swap_and_undo(windows: Windows, folder: Path, base: Path) -> dict[str, float]:
    """Seconds of the parts, and bytes."""

    async def both() -> dict[str, float]:
        prepared_s, answer = await windows.prepare(folder, base)
        if answer["routes"]["reload"][0] or answer["routes"]["assembled"][0]:
            raise RuntimeError(f"not all is direct: {answer['routes']}")
        there = await windows.open(str(folder))
        back = await windows.open("")
        await windows.release()
        wrote, undid = there.answers[0], back.answers[0]
        times = there.times
        return {
            "prepare": prepared_s,
            "write": wrote["write_ms"] / 1000,
            "read_back": wrote["proof_ms"] / 1000,
            "undo": undid["write_ms"] / 1000,
            "clear": undid["clear_ms"] / 1000,
            "apply": times.apply_ms / 1000,
            "pause": (times.quiesce_ms + times.apply_ms + times.resume_ms) / 1000,
            "prove": times.prove_ms / 1000,
            "bytes": float(wrote["bytes"]),
        }

    return asyncio.run(both())


def measure(server: Server, windows: Windows, disk: list[Path], staged: dict[str, Path], runs: int) -> Seconds:
    """One entry a run of every part. The engine has staged["base"] before and after each."""
    taken: Seconds = {}
    for run in range(-WARM_UP, runs):
        one: dict[str, float] = {}
        for name in ("full", "one_percent"):
            parts = swap_and_undo(windows, staged[name], staged["base"])
            one |= {f"{name}_{part}": value for part, value in parts.items()}
        (answer,) = server.call(server.llm.collective_rpc("benchmark_memcpy", args=(int(one["full_bytes"]),)))
        one["memcpy"] = answer["seconds"]
        one["reload"] = reload(server, disk[1])
        reload(server, disk[0])
        progress(f"run {run}: " + ", ".join(f"{k} {v * 1000:.1f} ms" for k, v in one.items() if "bytes" not in k))
        if run >= 0:
            for part, value in one.items():
                taken.setdefault(part, []).append(value)
    return taken


class Traffic:
    """Clients that stream greedy tokens all the time."""

    def __init__(self, server: Server, streams: int) -> None:
        self._server, self._streams = server, streams
        self._on = True
        self.arrivals: list[list[float]] = [[] for _ in range(streams)]

    async def _client(self, number: int) -> None:
        from vllm import SamplingParams

        asked = 0
        while self._on:
            asked += 1
            params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            async for _ in self._server.llm.generate(f"t{number + 5} t9 t11", params, f"c{number}-{asked}"):
                self.arrivals[number].append(time.perf_counter())
                if not self._on:
                    break

    @contextmanager
    def flowing(self) -> Iterator["Traffic"]:
        clients = [asyncio.run_coroutine_threadsafe(self._client(n), self._server.loop) for n in range(self._streams)]
        try:
            while not all(len(times) > 20 for times in self.arrivals):
                time.sleep(0.05)
            yield self
        finally:
            self._on = False
            for client in clients:
                client.result(CALL_DEADLINE_S)

    def rate(self, begun: float, ended: float) -> float:
        """Tokens a second."""
        return sum(begun <= at < ended for times in self.arrivals for at in times) / (ended - begun)


def client_gaps(
    server: Server, windows: Windows, folder: Path, base: Path, count: int, mode: str, name: str
) -> Seconds:
    """Of windows under one client's traffic: its longest gap, a decode step, and the pause that was reported."""
    found: Seconds = {name: [], f"{name}_step": [], f"{name}_pause": []}
    for run in range(count):
        asyncio.run(windows.prepare(folder, base))
        with Traffic(server, 1).flowing() as traffic:
            begun = time.perf_counter()
            result = asyncio.run(windows.open(str(folder), mode))
            time.sleep(0.3)
        times = [at for at in traffic.arrivals[0] if at >= begun - 0.5]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        found[name].append(max(gaps))
        found[f"{name}_step"].append(statistics.median(gaps))
        reported = result.times.quiesce_ms + result.times.apply_ms + result.times.resume_ms
        found[f"{name}_pause"].append(reported / 1000)
        progress(f"{name} {run}: {max(gaps) * 1000:.0f} ms without a token, a pause of {reported:.0f} ms")
        asyncio.run(windows.open(""))
        asyncio.run(windows.release())
    return found


def serving_shares(server: Server, windows: Windows, folder: Path, base: Path, work: Path, count: int) -> Seconds:
    """Tokens a second undisturbed, while an agent stages a version, and while the rank prepares it."""
    from hotweights.worker_client.agent_client import AgentClient
    from hotweights.worker_client.config import load_config

    found: Seconds = {"undisturbed": [], "staging": [], "preparing": [], "disturbed": []}
    for run in range(count):
        stage = work / f"stage{run}"
        environment = {"HOTWEIGHTS_STAGE_DIR": str(stage), "HOTWEIGHTS_AGENT_SOCKET": str(work / f"agent{run}.sock")}
        with Processes(work, environment) as processes, Traffic(server, STREAMS).flowing() as traffic:
            processes.start(f"agent{run}", ["hotweights.cli", "agent"])
            config = load_config({**environment, "HOTWEIGHTS_NODE": "bench"})
            while not config.agent_socket.exists():
                time.sleep(0.05)

            async def staged(config: Any = config) -> None:
                agent = AgentClient(config)
                try:
                    await agent.stage(await agent.identify_folder(folder))
                finally:
                    await agent.close()

            spans = {"undisturbed": span(lambda: asyncio.sleep(UNDISTURBED_S))}
            spans |= {"staging": span(staged), "preparing": span(lambda: windows.prepare(folder, base))}
            rates = {name: traffic.rate(*times) for name, times in spans.items()}
            busy = {name: spans[name][1] - spans[name][0] for name in ("staging", "preparing")}
            rates["disturbed"] = sum(rates[name] * busy[name] for name in busy) / sum(busy.values())
        progress(f"serving {run}: " + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
        for name, rate in rates.items():
            found[name].append(rate)
        asyncio.run(windows.release())
        shutil.rmtree(stage, ignore_errors=True)
    return found


def fetching_shares(server: Server, folder: Path, stages: Path, count: int) -> Seconds:
    """Tokens a second while an agent fetches a version from another: as fast as it can, and within LIMIT."""
    from hotweights.worker_client.config import load_config

    limits = {"fetching": "", "fetching_within_limit": LIMIT}
    found: Seconds = {f"{name}{part}": [] for name in limits for part in ("", "_alone")}
    for run in range(count):
        for name, limit in limits.items():
            port, here = free_port(), stages / f"{name}{run}"
            here.mkdir()
            endpoint = f"tcp://127.0.0.1:{port}"
            with Processes(here, {"HOTWEIGHTS_BANDWIDTH_MAX": limit}) as processes:
                serve = ["hotweights.cli", "coord-serve", "--endpoint", endpoint, "--store", "memory:"]
                processes.start("coordinator", serve)
                for node in ("publisher", "reader"):
                    stage = ["--node", node, "--stage-dir", str(here / node)]
                    processes.start(node, ["hotweights.cli", "agent", "--endpoint", endpoint, *stage])
                config = load_config({"HOTWEIGHTS_STAGE_DIR": str(here / "publisher"), "HOTWEIGHTS_NODE": "publisher"})
                with Traffic(server, STREAMS).flowing() as traffic:
                    before = span(lambda: asyncio.sleep(UNDISTURBED_S))
                    took = asyncio.run(distribute(endpoint, config, folder, "m", ["reader"])).update_s
                    during = time.perf_counter() - took, time.perf_counter()
                alone, rate = traffic.rate(*before), traffic.rate(*during)
            found[f"{name}_alone"].append(alone)
            found[name].append(rate)
            progress(f"{name} {run}: {rate:.0f} tokens/s for {took:.1f} s, alone {alone:.0f}")
            shutil.rmtree(here)
    return found


def span(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """When it began and ended."""

    async def done() -> None:
        await work()

    begun = time.perf_counter()
    asyncio.run(done())
    return begun, time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help="105 MB instead of 890 MB, fewer runs")
    arguments = parser.parse_args()
    size, runs, gaps = ("demo", RUNS_QUICK, GAPS_QUICK) if arguments.quick else ("large", RUNS, GAPS)
    os.environ["BENCHMARK_PLAIN_LINEAR"] = "1"
    memory = Path("/dev/shm")
    staging = Path(tempfile.mkdtemp(prefix="hotweights-bench-", dir=memory if memory.is_dir() else None))
    with tempfile.TemporaryDirectory(prefix="hotweights-bench-") as temporary:
        work = Path(temporary)
        try:
            disk = [make_checkpoint(work / f"v{seed}", seed, size) for seed in (1, 2)]
            one_percent_changed(disk[0], staging / "one_percent")
            staged = {"base": staging / "base", "full": staging / "full", "one_percent": staging / "one_percent"}
            for folder, label in zip(disk, ("base", "full"), strict=True):
                shutil.copytree(folder, staged[label])
            progress("starting the engine")
            server = Server(disk[0])
            windows = Windows(server)
            taken = measure(server, windows, disk, staged, runs)
            server.close()
            progress("starting an engine that leaves a core")
            server = Server(disk[0], leave_a_core=True)
            windows = Windows(server)
            for mode, name in (("keep", "gap"), ("recompute", "gap_recompute")):
                taken |= client_gaps(server, windows, staged["full"], staged["base"], gaps, mode, name)
            taken |= serving_shares(server, windows, disk[1], staged["base"], work, gaps)
            taken |= fetching_shares(server, disk[1], staging, gaps)
            server.close()
        finally:
            shutil.rmtree(staging)
    report = Report("apply", runs)
    for part, values in taken.items():
        rate = part in ("undisturbed", "staging", "preparing", "disturbed") or part.startswith("fetching")
        unit = "bytes" if part.endswith("bytes") else "tokens/s" if rate else "s"
        report.median(part if unit != "s" else f"{part}_s", values, unit)
    report.ratio("full_time", taken["full_write"], taken["memcpy"])
    report.ratio("one_percent_time", taken["one_percent_write"], taken["full_write"])
    report.ratio("undo_time", taken["full_undo"], taken["full_write"])
    report.ratio("reload_speedup_full", taken["reload"], taken["full_apply"])
    report.ratio("reload_speedup_1", taken["reload"], taken["one_percent_apply"])
    allowed = [pause + step for pause, step in zip(taken["gap_pause"], taken["gap_step"], strict=True)]
    report.ratio("client_gap", taken["gap"], allowed)
    report.ratio("serving_share", taken["disturbed"], taken["undisturbed"])
    report.ratio("fetching_share", taken["fetching"], taken["fetching_alone"])
    limited = taken["fetching_within_limit"], taken["fetching_within_limit_alone"]
    report.ratio("fetching_share_bandwidth_max", *limited)
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
