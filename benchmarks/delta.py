"""The next version to a node that has the one before, over a link of 1 Gbit/s: what crosses the wire, and the time.

    python -m benchmarks.delta --json [--quick]

    wire_share_X    bytes that left the publisher's link, over the image, where X % of the values changed (01: 0.1 %)
    speedup_1       time of the whole image to a node with nothing, over that of a version with 1 % changed, each from
                    publishing (hashing the folder) until the node has it verified in its stage
    speedup_next    likewise of the version after that, 1 % of it changed too: a trainer's every step but the first. The
                    node gives up the oldest image for it, whose memory it need not get from the system anew
    plain_overhead  time of staging a version in which everything changed on a node with the one before, over one with
                    nothing: what looking for deltas costs

    speedup_1_huge, speedup_next_huge
                    likewise, of nodes whose stages are on a tmpfs with huge pages (benchmarks.memory)

    agent_memory    (under medians) the most that the larger of the two agents took of memory of its own, in MB: beside
                    images, which are in files under /dev/shm

Coordinator, publisher and agents are the real ones, in two network namespaces with a limited link (tc tbf); see
benchmarks.fanout. Memory that an image is about to take has been used a moment before (benchmarks.memory). Values are
bf16; those that change are spread at random over all tensors, and move by one to three units in the last place.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import netns
from benchmarks.distribute import Took, distribute
from benchmarks.fanout import ENDPOINT, Fleet, sent_bytes
from benchmarks.memory import NoHugePages, huge_pages, use_once
from benchmarks.report import Report, progress
from hotweights.worker_client.config import load_config

MBIT = 1000.0
MIB = 1 << 20
IMAGE_MIB, IMAGE_MIB_QUICK = 512, 128
RUNS, RUNS_QUICK = 3, 1
SHARES = {"01": 0.001, "1": 0.01, "2": 0.02, "10": 0.1, "100": 1.0}
TENSORS = 16
SPEEDUPS = ("speedup_1", "speedup_next", "speedup_1_huge", "speedup_next_huge")
USED_IMAGES = 4  # of the memory that is free, as it is not known which the kernel will take
HUGE_IMAGES = 10
Values = dict[str, np.ndarray]


def random_values(random: np.random.Generator, size_bytes: int) -> Values:
    """bf16 weights as a model has them: normally distributed, as their bits."""
    count = size_bytes // TENSORS // 2
    return {
        f"layer.{n}": (random.standard_normal(count, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for n in range(TENSORS)
    }


def changed_values(random: np.random.Generator, values: Values, share: float) -> Values:
    changed = {}
    for name, before in values.items():
        steps = random.integers(1, 4, before.size, dtype=np.uint16)
        if share < 1:
            steps *= random.random(before.size, dtype=np.float32) < share
        changed[name] = before + steps
    return changed


def write(folder: Path, values: Values) -> Path:
    """As a checkpoint. Its values are told as U16, which no engine would take; nodes do not look at them."""
    folder.mkdir(parents=True)
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@contextmanager
def watched(pids: list[int]) -> Iterator[list[float]]:
    """What each of these processes has of memory of its own, in MB, looked at every 20 ms; all that was seen."""
    seen, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for pid in pids:
                with suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    seen.append(int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


class Pair:
    """A publisher and a node, and a folder of memory for images."""

    def __init__(self, fleet: Fleet, nodes: list[netns.Node], stages: Path, size_bytes: int) -> None:
        self._fleet, self._stages, self.size_bytes = fleet, stages, size_bytes
        self._publisher, self._node = nodes
        self._models = 0

    def forget(self) -> None:
        """The node begins anew, with nothing staged."""
        self._fleet.kill_agent(self._node)
        shutil.rmtree(self._stages / self._node.name, ignore_errors=True)
        self._fleet.start_agent(self._node)
        self._models += 1

    def send(self, folder: Path, version: str) -> tuple[Took, float, float]:
        """What it took, bytes on the wire over the image, and the most memory of an agent, in MB."""
        settings = {"HOTWEIGHTS_STAGE_DIR": str(self._stages / self._publisher.name), "HOTWEIGHTS_NODE": "here"}
        sent = 0

        def begin() -> None:
            nonlocal sent
            sent = sent_bytes(self._publisher)

        with watched(self._fleet.agent_pids()) as most:
            took = asyncio.run(
                distribute(
                    *(ENDPOINT, load_config(settings), folder, f"m{self._models}", [self._node.name]),
                    version=version,
                    begin=begin,
                )
            )
        return took, (sent_bytes(self._publisher) - sent) / self.size_bytes, max(most)


def measure(pair: Pair, stages: Path, runs: int, shares: Mapping[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    random = np.random.default_rng()
    for run in range(runs):
        values = random_values(random, pair.size_bytes)
        before = write(stages / "before", values)
        for name, share in shares.items():
            values_after = changed_values(random, values, share)
            after = write(stages / "after", values_after)
            pair.forget()
            os.utime(before / "model.safetensors")  # so that publishing hashes it again
            full, _, _ = pair.send(before, "v1")
            use_once(stages, USED_IMAGES * pair.size_bytes)
            step, wire, memory = pair.send(after, "v2")
            progress(
                f"run {run}: the whole in {full.publish_s:.2f} + {full.update_s:.2f} s, with {name} changed in "
                f"{step.publish_s:.2f} + {step.update_s:.2f} s, {wire:.4f} images on the wire, {memory:.0f} MB"
            )
            for key, value in (
                (f"full_{name}", full.publish_s + full.update_s),
                (f"step_{name}", step.publish_s + step.update_s),
                (f"full_stage_{name}", full.update_s),
                (f"step_stage_{name}", step.update_s),
                (f"wire_{name}", wire),
                ("agent_memory", memory),
            ):
                found.setdefault(key, []).append(value)
            if name == "1":
                later = write(stages / "later", changed_values(random, values_after, share))
                use_once(stages, USED_IMAGES * pair.size_bytes)
                next_step, _, _ = pair.send(later, "v3")
                progress(
                    f"run {run}: and the version after that in {next_step.publish_s:.2f} + {next_step.update_s:.2f} s"
                )
                found.setdefault("next_1", []).append(next_step.publish_s + next_step.update_s)
                shutil.rmtree(later)
            shutil.rmtree(after)
        shutil.rmtree(before)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help=f"{IMAGE_MIB_QUICK} MiB, one run")
    arguments = parser.parse_args()
    runs, size = (RUNS_QUICK, IMAGE_MIB_QUICK) if arguments.quick else (RUNS, IMAGE_MIB)
    report = Report("delta", runs)
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotweights-bench-")))
        stages = Path(tempfile.mkdtemp(prefix="hotweights-bench-", dir=memory if memory.is_dir() else None))
        stack.callback(shutil.rmtree, stages, True)
        try:
            nodes = stack.enter_context(netns.nodes(2, MBIT))
        except netns.NoNamespaces as error:
            for key in (*(f"wire_share_{name}" for name in SHARES), "plain_overhead", *SPEEDUPS):
                report.skip(key, str(error))
            report.emit(as_json=arguments.json)
            return 0
        fleet = Fleet(work, stages, nodes, max_images=2)
        with fleet.running("hotweights.cli"):
            found = measure(Pair(fleet, nodes, stages, size * MIB), stages, runs, SHARES)
        on_huge: dict[str, list[float]] = {}
        try:
            # Three folders that are published, three images in the node's stage, and what is used beforehand.
            large = stack.enter_context(huge_pages(HUGE_IMAGES * size * MIB))
        except NoHugePages as error:
            for key in SPEEDUPS[2:]:
                report.skip(key, str(error))
        else:
            fleet = Fleet(work, large / "stages", nodes, max_images=2)
            with fleet.running("hotweights.cli"):
                pair = Pair(fleet, nodes, large / "stages", size * MIB)
                on_huge = measure(pair, large, runs, {"1": SHARES["1"]})
    report.medians["agent_memory"] = {"value": max(found.pop("agent_memory")), "unit": "MB"}
    for key, values in found.items():
        report.median(key, values, "images" if key.startswith("wire") else "s")
    for name in SHARES:
        report.ratios[f"wire_share_{name}"] = report.medians[f"wire_{name}"]["value"]  # type: ignore[assignment]
    report.ratio("speedup_1", found["full_1"], found["step_1"])
    report.ratio("speedup_next", found["full_1"], found["next_1"])
    if on_huge:
        for key in ("full_1", "step_1", "next_1"):
            report.median(f"{key}_huge", on_huge[key], "s")
        report.ratio("speedup_1_huge", on_huge["full_1"], on_huge["step_1"])
        report.ratio("speedup_next_huge", on_huge["full_1"], on_huge["next_1"])
    report.ratio("plain_overhead", found["step_stage_100"], found["full_stage_100"])
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    os.environ.pop("HOTWEIGHTS_ENDPOINT", None)
    sys.exit(main())
