"""How much an image may take: what the file system has, and what the memory behind it has.

A file in /dev/shm is memory. Room on that file system beyond what the machine or the container
may still use ends in the OOM killer, not in ENOSPC, so the smallest of the limits counts.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs"}
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes that may be allocated now, and the limit that says so."""

    free_bytes: int
    limited_by: str


def measure_room(folder: Path, *, used_bytes: int = 0, quota_bytes: int | None = None) -> Room:
    """The least of: free space of the file system, memory behind it, the quota less `used_bytes`, perhaps below 0."""
    stat = os.statvfs(folder)
    rooms = [Room(stat.f_bavail * stat.f_frsize, "stage")]
    if quota_bytes is not None:
        rooms.append(Room(quota_bytes - used_bytes, "quota"))
    if sys.platform == "linux" and _mount_of(folder)[1] in _MEMORY_FILE_SYSTEMS:
        rooms += [room for room in (_machine_memory(), _container_memory()) if room is not None]
    return min(rooms, key=lambda room: room.free_bytes)


def small_pages(folder: Path) -> str:
    """The mount point of the tmpfs that `folder` is on, if it gives files no huge pages; else empty.

    Taking, mapping and freeing memory by 4 KiB is much of what a node does with an image (benchmarks.transfer).
    """
    if sys.platform != "linux":
        return ""
    point, kind, options = _mount_of(folder)
    return point if kind == "tmpfs" and not any(option.startswith("huge=") for option in options) else ""


def _mount_of(folder: Path) -> tuple[str, str, list[str]]:
    """Mount point, type and options of the file system `folder` is on: the longest mount point above it."""
    path, best, kind, options = str(folder.resolve()), "", "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, after = line.partition(" - ")
        point = fields.split()[4]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, (kind, *_, options) = point, after.split()
    return best, kind, options.split(",")


def _machine_memory() -> Room | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return Room(int(line.split()[1]) * 1024, "memory of the machine")
    return None


def _container_memory() -> Room | None:
    """What the container's own limit leaves: cgroup v2 as seen from inside. Page cache may go, so it counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # cgroup v1, or the root of v2: no limit to read here
        return None
    reclaimable = int(stat.get("inactive_file", "0")) + int(stat.get("active_file", "0"))
    return Room(max(0, int(limit) - used + reclaimable), "memory of the container")
