"""Stores by the name that `--store` takes."""

from pathlib import Path

from hotweights.coordinator.store.base import Store
from hotweights.coordinator.store.memory import MemoryStore
from hotweights.coordinator.store.sqlite import SqliteStore


def open_store(spec: str, events_max: int) -> Store:
    """The store that `sqlite:PATH` or `memory:` names, not opened yet. Raises ValueError."""
    kind, separator, rest = spec.partition(":")
    if kind == "memory" and separator and not rest:
        return MemoryStore(events_max)
    if kind == "sqlite" and rest:
        return SqliteStore(Path(rest).expanduser(), events_max)
    raise ValueError(f"store {spec!r}: write sqlite:PATH or memory:")
