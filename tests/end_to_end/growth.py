"""What a fleet's processes hold, sample by sample, and by how much it grew."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
EDGE = 3  # samples at each end whose median is taken: one that fell into an allocation proves nothing


def descendants(pid: int) -> list[int]:
    """Ids of the processes that it started, those that they started, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def name_of(pid: int) -> str:
    """As the process calls itself: vLLM's do."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def process_holds(pid: int) -> dict[str, float]:
    """Memory of its own (files and shared memory apart, which are counted where they lie), descriptors, threads."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        "memory_mib": round(int(fields["RssAnon"].split()[0]) / 1024, 1),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
        "mapped_files": sum(".safetensors" in line for line in maps),
    }


def folder_mib(folder: Path) -> float:
    """Of every file in it, as far as it is allocated; who vanishes meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            continue
    return round(total / MIB, 2)


@dataclass
class Series:
    """Samples of a run by what was measured: "rank memory_mib" -> one number a sample."""

    at: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, at: int, sample: Mapping[str, float]) -> None:
        self.at.append(at)
        for name, value in sample.items():
            self.values.setdefault(name, []).append(value)

    def growth(self, name: str) -> float:
        """From the first samples to the last, by their medians."""
        values = self.values[name]
        return round(statistics.median(values[-EDGE:]) - statistics.median(values[:EDGE]), 2)

    def beyond(self, bounds: Mapping[str, float]) -> dict[str, float]:
        """What grew by more than its bound: the one of its name, or of its kind, which is the name's last word."""
        grown = {name: self.growth(name) for name in self.values}
        kinds = {name: name.rsplit(" ", 1)[-1] for name in grown}
        return {name: by for name, by in grown.items() if by > bounds.get(name, bounds[kinds[name]])}

    def as_dict(self) -> dict[str, object]:
        series = {name: {"grew": self.growth(name), "values": values} for name, values in self.values.items()}
        return {"swaps": self.at, "series": series}
