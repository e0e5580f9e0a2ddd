"""Replicas without an engine beside real parts: controller, session and agent are those of a server."""

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from fleet import WAIT_S, Fleet, wait_for
from tests.worker_client.window.fakes import FakeEngine

from hotweights.worker_client.agent_client import connect_or_start
from hotweights.worker_client.config import load_config
from hotweights.worker_client.session import Session
from hotweights.worker_client.window.controller import Identity, ReplicaController, Stream
from hotweights.worker_client.window.engine import Status
from hotweights.worker_client.window.identify import Images


class FolderEngine(FakeEngine):
    """Serves a folder; its proof is what is in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ranks=1, folder=str(folder))
        self._proofs: dict[str, bytes] = {}

    def proof(self, rank: int) -> bytes:
        folder = self.weights[rank]
        if folder not in self._proofs:
            self._proofs[folder] = blake3((Path(folder) / "model.safetensors").read_bytes()).digest()
        return self._proofs[folder]

    def _undo(self, rank: int, options: dict[str, Any]) -> Status:
        self.kept = self.kept or list(self.weights)  # what refused to be applied changed nothing
        return super()._undo(rank, options)


class StandInReplica:
    """In a thread of its own for as long as the `with` lasts, on the fleet's node."""

    def __init__(self, fleet: Fleet, replica: str, model: str, folder: Path) -> None:
        self.engine = FolderEngine(folder)
        self.replica = replica
        self._fleet = fleet
        self._config = dataclasses.replace(load_config(fleet.environment), model=model, replica=replica)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name=replica)

    def __enter__(self) -> "StandInReplica":
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        wait_for(f"{self.replica} identified", lambda: self.shown().get("active_digest"))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._controller.close)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def shown(self) -> Any:
        """As the coordinator sees it."""
        return next((r for r in self._fleet.status()["replicas"] if r["id"] == self.replica), {})

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()

        async def connect() -> Images:
            return await connect_or_start(self._config)

        def open_stream(hello: Callable[[], Any], on_order: Callable[[Any], Awaitable[str]], welcomed: Any) -> Stream:
            assert self._config.endpoint is not None
            return Session(self._config.endpoint, hello, on_order, on_welcome=welcomed)

        identity = Identity(self.replica, self._config.node, self._config.model)
        self._controller = ReplicaController(identity, self.engine, connect, open_stream)
        self._ready.set()
        await self._controller.run()
