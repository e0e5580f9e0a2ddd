"""An image from a publisher's agent to other nodes, by an update of a real coordinator, cancelled when all have it.

Engines are left out: replicas that take orders and do nothing stand for them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 180.0


@dataclass(frozen=True)
class Took:
    """Seconds."""

    publish_s: float  # hashing the folder and telling the coordinator
    update_s: float  # from StartUpdate until every node's replica is asked to prepare: then it has the image staged


class Replica:
    """Stands for an engine on a node: notes when it is asked to prepare."""

    def __init__(self, endpoint: str, node: str, model: str) -> None:
        from hotweights.wire.endpoint import parse_endpoint
        from hotweights.worker_client.session import Session

        self.node, self._model = node, model
        self.prepares = asyncio.Event()
        self.welcome = asyncio.Event()
        self._session = Session(
            parse_endpoint(endpoint), self._hello, self._on_order, on_welcome=lambda _: self.welcome.set()
        )
        self._running = asyncio.ensure_future(self._session.run())

    async def close(self) -> None:
        await self._session.close()
        await self._running

    def _hello(self) -> Any:
        from hotweights.v1 import worker_service_pb2 as pb

        replica = pb.ReplicaHello(replica_id=f"{self._model}-{self.node}", model=self._model, engine="none")
        replica.ranks.add(index=0, node_id=self.node, pid=1)
        return pb.Hello(replica=replica)

    async def _on_order(self, order: Any) -> str:
        if order.WhichOneof("action") == "prepare":
            self.prepares.set()  # and no more: the update is cancelled then, and the image may go
        return ""


async def distribute(
    endpoint: str,
    publisher: Any,
    folder: Path,
    model: str,
    nodes: Sequence[str],
    *,
    version: str = "v1",
    begin: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], Awaitable[set[str]]] | None = None,
) -> Took:
    """Publishes and updates, and waits in between for who is to take part.

    `publisher` is the config of the publisher's agent, `model` and `version` are such as no other call names.
    `begin` is called right before the clock starts; `meanwhile` runs beside it and gives the nodes that are not
    waited for.
    """
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import coordinator_service_pb2_grpc as rpc
    from hotweights.wire.channel import open_channel
    from hotweights.wire.endpoint import parse_endpoint
    from hotweights.worker_client.agent_client import AgentClient

    await until(publisher.agent_socket.exists, "the publisher's agent")
    agent, channel = AgentClient(publisher), open_channel(parse_endpoint(endpoint))
    coordinator = rpc.CoordinatorServiceStub(channel)
    replicas = [Replica(endpoint, node, model) for node in nodes]
    try:
        published_at = time.perf_counter()
        await agent.publish_folder(folder, model, version)
        publish_s = time.perf_counter() - published_at
        for replica in replicas:
            await asyncio.wait_for(replica.welcome.wait(), DEADLINE_S)
        missing, held, ends = set(nodes), False, time.monotonic() + DEADLINE_S
        while missing or not held:
            if time.monotonic() > ends:
                raise TimeoutError(f"no agent on {sorted(missing)}" if missing else "the publisher is not there")
            listed = await coordinator.ListNodes(pb.ListNodesRequest(page_size=100), timeout=10)
            missing = set(nodes) - {node.id for node in listed.nodes if node.connected}
            found = await coordinator.GetVersion(pb.GetVersionRequest(model=model, version=version), timeout=10)
            held = bool(found.version.holder_node_ids)
            await asyncio.sleep(0.1)
        begin()
        begun = time.perf_counter()
        started = await coordinator.StartUpdate(pb.StartUpdateRequest(model=model, version=version), timeout=20)
        gone = await meanwhile() if meanwhile is not None else set()
        waiting = [replica.prepares.wait() for replica in replicas if replica.node not in gone]
        await asyncio.wait_for(asyncio.gather(*waiting), DEADLINE_S)
        took = Took(publish_s, time.perf_counter() - begun)
        await coordinator.CancelUpdate(pb.CancelUpdateRequest(id=started.update.id), timeout=20)
        return took
    finally:
        for replica in replicas:
            await replica.close()
        await agent.close()
        await channel.close()


async def until(holds: Callable[[], bool], what: str) -> None:
    """Raises TimeoutError after DEADLINE_S."""
    ends = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(what)
        await asyncio.sleep(0.1)
