"""An image to 1, 2, 4, 8 and 16 nodes over links of 200 Mbit/s: how much longer many nodes take than one.

    python -m benchmarks.fanout --json [--quick]

    growth_N         time until all of N nodes have it verified in their stage, over the time of one node
    star_growth_16   likewise where every node takes it from the publisher (full run only)
    death_growth_8   time of the other seven where the agent of one in the middle is killed half-way, over one node's
    publisher_share  bytes that left the publisher's link for 16 nodes, over the image

Coordinator, publisher and agents are the real ones, each node in a network namespace whose link is limited both ways
(tc tbf). Engines are left out: replicas that take orders and do nothing stand for them. The clock runs from StartUpdate
until every node's replica is asked to prepare, which is when its node has said that all is staged; then the update is
cancelled.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import netns
from benchmarks.distribute import distribute
from benchmarks.report import Report, progress

COUNTS = (1, 2, 4, 8, 16)
MBIT = 200.0
MIB = 1 << 20
IMAGE_MIB, IMAGE_MIB_QUICK = 128, 32
RUNS, RUNS_QUICK = 3, 1
PORT = 55177
ENDPOINT = f"tcp://{netns.HERE}:{PORT}"
Times = dict[str, list[float]]


def make_image(folder: Path, size_bytes: int) -> Path:
    """Random bytes: nothing on the way can make them fewer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    numbers = np.random.default_rng()
    tensors = {f"layer.{n}": numbers.integers(0, 255, size_bytes // 8, np.uint8) for n in range(8)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


class Fleet:
    """A publisher and 16 nodes, with everything that runs in them."""

    def __init__(self, work: Path, stages: Path, nodes: list[netns.Node], *, max_images: int = 1) -> None:
        self._work, self._stages, self._nodes = work, stages, nodes
        self._max_images = max_images
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._versions = 0

    @contextmanager
    def running(self, module: str) -> Iterator["Fleet"]:
        """With the coordinator that this module runs."""
        serve = [sys.executable, "-m", module, "coord-serve", "--endpoint", ENDPOINT, "--store", "memory:"]
        try:
            self._coordinator = self._start("coordinator", [*serve, "--insecure"])
            for node in self._nodes:
                self.start_agent(node)
            yield self
        finally:
            for process in (*self._agents.values(), self._coordinator):
                if process is not None:
                    process.terminate()
            for process in (*self._agents.values(), self._coordinator):
                if process is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(20)
                    process.kill()
            self._agents.clear()
            shutil.rmtree(self._stages, ignore_errors=True)

    def _start(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        with (self._work / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_agent(self, node: netns.Node) -> None:
        agent = [sys.executable, "-m", "hotweights.cli", "agent", "--endpoint", ENDPOINT, "--node", node.name]
        stage = ["--stage-dir", str(self._stages / node.name), "--listen", f"{node.address}:0"]
        stage += ["--max-images", str(self._max_images)]
        self._agents[node.name] = self._start(node.name, node.command([*agent, *stage]))

    def agent_pids(self) -> list[int]:
        return [process.pid for process in self._agents.values()]

    def kill_agent(self, node: netns.Node) -> None:
        """At once, as a crash does. `ip netns exec` has become the agent itself."""
        self._agents[node.name].send_signal(signal.SIGKILL)
        self._agents[node.name].wait(20)

    async def time_of(self, count: int, size_bytes: int, *, dies: int | None = None) -> tuple[float, float]:
        """Seconds until `count` nodes have a new image, and the bytes that left the publisher, over the image.

        With `dies` that node's agent, counted from 0, is killed when half of the expected time is over.
        """
        from hotweights.worker_client.config import load_config

        self._versions += 1
        model = f"m{self._versions}"
        folder = make_image(self._stages / f"image{self._versions}", size_bytes)
        publisher, taking = self._nodes[0], self._nodes[1 : count + 1]
        config = load_config({"HOTWEIGHTS_STAGE_DIR": str(self._stages / publisher.name), "HOTWEIGHTS_NODE": "here"})
        sent = 0

        def begin() -> None:
            nonlocal sent
            sent = sent_bytes(publisher)

        async def meanwhile() -> set[str]:
            if dies is None:
                return set()
            await asyncio.sleep(size_bytes * 8 / (MBIT * 1e6) / 2)
            self.kill_agent(taking[dies])
            return {taking[dies].name}

        names = [node.name for node in taking]
        try:
            took = await distribute(ENDPOINT, config, folder, model, names, begin=begin, meanwhile=meanwhile)
            return took.update_s, (sent_bytes(publisher) - sent) / size_bytes
        finally:
            shutil.rmtree(folder)
            if dies is not None:
                self.start_agent(taking[dies])


def sent_bytes(node: netns.Node) -> int:
    """That came from the node to the bridge so far."""
    return int(Path(f"/sys/class/net/{node.name}-out/statistics/rx_bytes").read_text())


async def measure(fleet: Fleet, counts: tuple[int, ...], size_bytes: int, runs: int, name: str) -> Times:
    """All counts in turn, run by run."""
    found: Times = {f"{name}{part}_{count}": [] for count in counts for part in ("", "_share")}
    for run in range(runs):
        for count in counts:
            took, share = await fleet.time_of(count, size_bytes)
            found[f"{name}_{count}"].append(took)
            found[f"{name}_share_{count}"].append(share)
            progress(f"{name} run {run}: {count} nodes in {took:.2f} s, the publisher sent {share:.2f} images")
    return found


async def deaths(fleet: Fleet, size_bytes: int, runs: int) -> Times:
    """Eight nodes, of which the fourth dies."""
    found: Times = {"death_8": []}
    for run in range(runs):
        took, _ = await fleet.time_of(8, size_bytes, dies=3)
        found["death_8"].append(took)
        progress(f"death run {run}: the other 7 nodes in {took:.2f} s")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help=f"{IMAGE_MIB_QUICK} MiB, one run, no star")
    arguments = parser.parse_args()
    runs, size = (RUNS_QUICK, IMAGE_MIB_QUICK) if arguments.quick else (RUNS, IMAGE_MIB)
    report = Report("fanout", runs)
    keys = [*(f"growth_{count}" for count in COUNTS[1:]), "star_growth_16", "death_growth_8", "publisher_share"]
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotweights-bench-")))
        stages = Path(tempfile.mkdtemp(prefix="hotweights-bench-", dir=memory if memory.is_dir() else None))
        stack.callback(shutil.rmtree, stages, True)
        try:
            nodes = stack.enter_context(netns.nodes(COUNTS[-1] + 1, MBIT))
        except netns.NoNamespaces as error:
            for key in keys:
                report.skip(key, str(error))
            report.emit(as_json=arguments.json)
            return 0
        fleet = Fleet(work, stages, nodes)
        with fleet.running("hotweights.cli"):
            taken = asyncio.run(measure(fleet, COUNTS, size * MIB, runs, "chain"))
            taken |= asyncio.run(deaths(fleet, size * MIB, runs))
        if arguments.quick:
            report.skip("star_growth_16", "only in the full run")
        else:
            stages.mkdir(exist_ok=True)
            with fleet.running("benchmarks.star_coordinator"):
                taken |= asyncio.run(measure(fleet, (1, 16), size * MIB, 1, "star"))
    for name, values in taken.items():
        report.median(name, values, "images" if "share" in name else "s")
    for count in COUNTS[1:]:
        report.ratio(f"growth_{count}", taken[f"chain_{count}"], taken["chain_1"])
    if "star_16" in taken:
        report.ratio("star_growth_16", taken["star_16"], taken["star_1"])
    report.ratio("death_growth_8", taken["death_8"], taken["chain_1"])
    report.ratios["publisher_share"] = report.medians["chain_share_16"]["value"]  # type: ignore[assignment]
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    os.environ.pop("HOTWEIGHTS_ENDPOINT", None)
    sys.exit(main())
