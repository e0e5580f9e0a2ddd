"""A store that ends with its process: for play and for tests of something else."""

import uuid

from hotweights.coordinator.store.base import Batch, Compacted, Opened


class MemoryStore:
    """Keeps `events_max` events; nothing outlives the object."""

    name = "memory:"

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._cluster_id = str(uuid.uuid4())
        self._epoch = 0
        self._records: dict[str, bytes] = {}
        self._events: dict[int, bytes] = {}
        self._answers: dict[str, tuple[float, bytes]] = {}
        self._manifests: dict[str, bytes] = {}
        self._last = 0

    async def open(self) -> Opened:
        self._epoch += 1
        return Opened(self._cluster_id, self._epoch, dict(self._records), self._last)

    async def write(self, batch: Batch) -> None:
        self._records.update(batch.puts)
        for key in batch.deletes:
            self._records.pop(key, None)
        for revision, payload in batch.events:
            self._events[revision] = payload
            self._last = revision
        while len(self._events) > self._events_max:
            self._events.pop(next(iter(self._events)))
        self._answers.update(batch.answers)
        while len(self._answers) > self._events_max:
            self._answers.pop(next(iter(self._answers)))
        self._manifests.update(batch.manifests)
        for digest in batch.manifest_deletes:
            self._manifests.pop(digest, None)

    async def events_from(self, revision: int, limit: int) -> list[tuple[int, bytes]]:
        first = next(iter(self._events), self._last + 1)
        if revision < first:
            raise Compacted(first)
        last = min(self._last, revision + limit - 1)
        return [(at, self._events[at]) for at in range(revision, last + 1)]

    async def manifest(self, digest: str) -> bytes | None:
        return self._manifests.get(digest)

    async def answer(self, key: str, now: float) -> bytes | None:
        expires_at, payload = self._answers.get(key, (0.0, None))
        return payload if expires_at > now else None

    async def close(self) -> None:
        pass
