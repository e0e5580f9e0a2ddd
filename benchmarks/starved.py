"""How long a process waits to start beside an engine that generates without pause, on all cores and with one left.

    python -m benchmarks.starved --json [--quick]

No part of Hotweights runs: this is why the demo and the tests keep engines off the first core, and why the docs advise
it. vLLM's processes wait for each other with sched_yield; how long others wait then depends on the kernel (within the
engine's own session nobody waited on Linux 6.18, so it has one of its own here, as services do). Engines are started in
turn, one of each kind a run. `start_time` is the slowest start of a Python beside the engine on all cores,
over the slowest beside the other; `batch_rate` is what the engine did meanwhile, the other's over the one on all cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.report import Report, progress

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from live_processes import leave_a_core
from random_llama import make_checkpoint

RUNS, RUNS_QUICK = 5, 2
LOOK_S = 20.0
START_DEADLINE_S, END_DEADLINE_S = 300.0, 120.0
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = ["t210 t219 t420", "t185 t194 t370", "t25 t34 t50"]


def generate(folder: str) -> None:
    """A line for each batch, until stdin ends."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=True, max_model_len=256, dtype="bfloat16")
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while not ended.is_set():
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
        print("batch", flush=True)


class Engine:
    """A process that generates, and how many batches it has made."""

    def __init__(self, folder: Path, *, core_left: bool) -> None:
        self.batches = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.starved", "--generate", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **SETTINGS},
            text=True,
            start_new_session=True,  # the kernel shares out cores by session, as it does by container
        )
        if core_left:
            leave_a_core(self._process.pid)
        threading.Thread(target=self._count, daemon=True).start()
        ends = time.monotonic() + START_DEADLINE_S
        while not self.batches:
            if self._process.poll() is not None or time.monotonic() > ends:
                self._end_all()
                raise RuntimeError("the engine did not start")
            time.sleep(0.1)

    def _count(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.batches += line == "batch\n"  # vLLM logs to stdout as well

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_DEADLINE_S)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        """Its engine core is of the same group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@contextmanager
def engine(folder: Path, *, core_left: bool) -> Iterator[Engine]:
    running = Engine(folder, core_left=core_left)
    try:
        yield running
    finally:
        running.close()


def slowest_start(look_s: float) -> float:
    """Seconds; a start that is under way when the time is over is waited for."""
    slowest, ends = 0.0, time.monotonic() + look_s
    while time.monotonic() < ends:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=END_DEADLINE_S)
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--generate", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        generate(arguments.generate)
        return 0
    runs = RUNS_QUICK if arguments.quick else RUNS
    starts: dict[bool, list[float]] = {False: [], True: []}
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="hotweights-bench-") as name:
        folder = make_checkpoint(Path(name) / "small", 1, "small")
        for run in range(runs):
            for core_left in (False, True):
                progress(f"run {run + 1} of {runs}, {'a core left' if core_left else 'all cores'}")
                with engine(folder, core_left=core_left) as running:
                    before, began = running.batches, time.monotonic()
                    starts[core_left].append(slowest_start(LOOK_S))
                    rates[core_left].append((running.batches - before) / (time.monotonic() - began))
    report = Report("starved", runs)
    for core_left, key in ((False, "all_cores"), (True, "a_core_left")):
        report.median(f"slowest_start_{key}_s", starts[core_left], "s")
        report.median(f"batches_{key}", rates[core_left], "1/s")
    report.ratio("start_time", starts[False], starts[True])
    report.ratio("batch_rate", rates[True], rates[False])
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
