"""The interface of a store: a few records, a log, and blobs, all written in one step.

A `Batch` is durable as a whole or not at all. The last opener has the highest epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class StoreError(Exception):
    """What every error of a store is."""


class StoreInUse(StoreError):
    """Another coordinator has it open."""


class WriteRefused(StoreError):
    """Nothing of the batch was written (disk full); writing again later may work."""


class StoreBroken(StoreError):
    """What was written is unknown, or the store cannot be read: the leader stops."""


class Compacted(StoreError):
    """Events before `first` are no longer kept."""

    def __init__(self, first: int) -> None:
        super().__init__(f"events before revision {first} are no longer kept")
        self.first = first


@dataclass
class Batch:
    """One atomic write."""

    puts: dict[str, bytes] = field(default_factory=dict)
    deletes: set[str] = field(default_factory=set)
    # Revision and payload, rising.
    events: list[tuple[int, bytes]] = field(default_factory=list)
    # By request key: when it may be forgotten, and the answer.
    answers: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    # By digest in hex.
    manifests: dict[str, bytes] = field(default_factory=dict)
    manifest_deletes: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.puts or self.deletes or self.events or self.answers or self.manifests or self.manifest_deletes)


@dataclass(frozen=True)
class Opened:
    """What a new leader finds. `epoch` is its own, already durable."""

    cluster_id: str
    epoch: int
    records: Mapping[str, bytes]
    last_revision: int


class Store(Protocol):
    """Used by one runtime, from one event loop."""

    @property
    def name(self) -> str:
        """As `--store` spells it."""

    async def open(self) -> Opened:
        """Takes the store for this process. Raises StoreInUse or StoreBroken."""

    async def write(self, batch: Batch) -> None:
        """Durable when it returns. Raises WriteRefused or StoreBroken."""

    async def events_from(self, revision: int, limit: int) -> list[tuple[int, bytes]]:
        """Up to `limit` events from a revision on. Raises Compacted."""

    async def manifest(self, digest: str) -> bytes | None:
        """A serialised manifest, by its digest in hex."""

    async def answer(self, key: str, now: float) -> bytes | None:
        """What was answered to a request, unless forgotten."""

    async def close(self) -> None:
        """Gives the store back."""
