"""Between the rules' records and the store's keys: what changed, and what was found.

The runtime compares tables, so a transition cannot forget to persist.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hotweights.coordinator.rules.records import (
    ModelRecord,
    ReplicaRecord,
    UpdateRecord,
    VersionRecord,
)
from hotweights.coordinator.rules.state import Limits, State, recovered
from hotweights.coordinator.store.base import Batch, Opened
from hotweights.coordinator.store.codec import decode, encode


def changes(before: State, after: State) -> Batch:
    """What must be written for `after` to be as durable as `before`."""
    batch = Batch()
    for prefix, old, new in _tables(before, after):
        if old is new:
            continue
        for key, record in new.items():
            if old.get(key) is not record:
                batch.puts[_key(prefix, key)] = encode(record)
        for key in old:
            if key not in new:
                batch.deletes.add(_key(prefix, key))
    used = {version.digest for version in after.versions.values()}
    if before.versions is not after.versions:
        had = {version.digest for version in before.versions.values()}
        batch.manifest_deletes = had - used
    return batch


def _tables(before: State, after: State) -> tuple[tuple[str, Mapping[Any, Any], Mapping[Any, Any]], ...]:
    return (
        ("model", before.models, after.models),
        ("version", before.versions, after.versions),
        ("update", before.updates, after.updates),
        ("replica", before.replicas, after.replicas),
    )


def _key(prefix: str, key: str | tuple[str, str]) -> str:
    # Names hold no blanks, so the parts stay apart.
    return f"{prefix} {key if isinstance(key, str) else ' '.join(key)}"


def restored(opened: Opened, limits: Limits, now: float) -> State:
    """The state a new leader begins with. Raises ValueError on a record it cannot read."""
    models: dict[str, ModelRecord] = {}
    versions: dict[tuple[str, str], VersionRecord] = {}
    updates: dict[str, UpdateRecord] = {}
    replicas: dict[str, ReplicaRecord] = {}
    for key, data in opened.records.items():
        prefix = key.partition(" ")[0]
        if prefix == "model":
            model = decode(ModelRecord, data)
            models[model.name] = model
        elif prefix == "version":
            version = decode(VersionRecord, data)
            versions[version.model, version.name] = version
        elif prefix == "update":
            update = decode(UpdateRecord, data)
            updates[update.id] = update
        elif prefix == "replica":
            replica = decode(ReplicaRecord, data)
            replicas[replica.id] = replica
    state = State(epoch=opened.epoch, led_at=now, limits=limits)
    return recovered(replace(state, models=models, versions=versions, updates=updates, replicas=replicas))
