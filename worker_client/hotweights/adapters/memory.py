"""How much memory of the host a process may still take: the smaller of what the machine and its cgroup have left."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class NotEnoughMemory(Exception):
    """What an update must hold beside the model does not fit."""

    def __init__(self, purpose: str, needed: int, available: int) -> None:
        super().__init__(
            f"{purpose} needs {needed >> 20} MiB of host memory on this node, {available >> 20} MiB are available"
        )
        self.purpose = purpose
        self.needed_bytes = needed
        self.available_bytes = available


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available_bytes() -> int | None:
    """None where the system does not tell (macOS)."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    machine = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return machine
    return min(machine, max(limit - used, 0))


def require(purpose: str, needed: int) -> None:
    """Raises NotEnoughMemory, with the figures, when `needed` bytes do not fit."""
    available = available_bytes()
    if available is not None and needed > available:
        raise NotEnoughMemory(purpose, needed, available)
