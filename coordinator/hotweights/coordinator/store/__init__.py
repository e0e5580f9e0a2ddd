"""Where what is durable is kept: one interface, SQLite by default, memory for play."""

from hotweights.coordinator.store.base import (
    Batch,
    Compacted,
    Opened,
    Store,
    StoreBroken,
    StoreInUse,
    WriteRefused,
)
from hotweights.coordinator.store.registry import open_store

__all__ = [
    "Batch",
    "Compacted",
    "Opened",
    "Store",
    "StoreBroken",
    "StoreInUse",
    "WriteRefused",
    "open_store",
]
