"""A controller between a fake coordinator, a fake agent and a fake engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.worker_client.window.fakes import FakeAgent, FakeEngine, FakeStream

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.worker_client.window.controller import Identity, ReplicaController
from hotweights.worker_client.window.identify import Images

V1, V2, V3 = b"base", b"v2", b"v3"


@dataclass
class Bench:
    """Orders in, reports out."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    agent: FakeAgent = field(default_factory=FakeAgent)
    stream: FakeStream = field(default_factory=FakeStream)
    controller: ReplicaController | None = None

    async def prepare(self, digest: bytes, **more: Any) -> pb.Report:
        assert await self.stream.give(prepare=pb.PrepareImage(manifest_digest=digest, deadline_s=5, **more)) == ""
        return await self.stream.take()

    async def apply(self, digest: bytes, **more: Any) -> pb.Report:
        order = pb.ApplyImage(
            manifest_digest=digest,
            **{
                "version": digest.decode(),
                "validity_s": 5,
                "quiesce_deadline_s": 0.3,
                "apply_deadline_s": 0.3,
                **more,
            },
        )
        assert await self.stream.give(apply=order) == ""
        return await self.stream.take()

    async def end(self, *, committed: bool = True) -> None:
        await self.stream.give(end=pb.EndUpdate(committed=committed))
        await until(lambda: "release" in self.engine.calls)


async def until(true: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not true():  # noqa: ASYNC110 - what is waited for is a fake without an event
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 5)


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    """With a controller that has said what is served."""
    bench.agent.held = {V1, V2, V3}

    async def connect() -> Images:
        return bench.agent

    bench.controller = ReplicaController(Identity("r1", "n1"), bench.engine, connect, bench.stream.open)
    runs = asyncio.ensure_future(bench.controller.run())
    changed = await bench.stream.take()
    assert changed.active_changed.active_digest == V1
    yield bench
    bench.controller.close()
    await asyncio.wait_for(runs, 5)
    assert bench.agent.closed
