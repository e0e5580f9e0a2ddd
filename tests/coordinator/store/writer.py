"""A coordinator's store in a process of its own, made to be killed: says each revision once it is durable.

python writer.py PATH FIRST
"""

import asyncio
import sys
from pathlib import Path

from hotweights.coordinator.store import Batch
from hotweights.coordinator.store.sqlite import SqliteStore


async def write_for_ever(path: Path, revision: int) -> None:
    store = SqliteStore(path, events_max=100_000)
    await store.open()
    while True:
        text = str(revision).encode()
        await store.write(
            Batch(
                puts={"model last": text, f"version {revision}": text},
                deletes={f"version {revision - 3}"},
                events=[(revision, text)],
                answers={f"request {revision}": (1e12, text)},
                manifests={f"{revision:064x}": text * 50},
            )
        )
        print(revision, flush=True)
        revision += 1


asyncio.run(write_for_ever(Path(sys.argv[1]), int(sys.argv[2])))
