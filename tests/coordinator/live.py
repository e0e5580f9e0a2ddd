"""A real coordinator on port 0, and clients that speak to it through the stubs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import blake3
import grpc

from hotweights.coordinator.config import Config
from hotweights.coordinator.server import Coordinator
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import fleet_pb2, manifest_pb2, worker_service_pb2, worker_service_pb2_grpc
from hotweights.wire.channel import PAGE_BYTES_MAX, open_channel
from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.errors import HotweightsError, Refused, from_rpc_error

T = TypeVar("T")
DEADLINE_S = 10.0


async def soon(work: Any) -> Any:
    """Awaits with a deadline; a failed call raises this package's error."""
    try:
        return await asyncio.wait_for(work, DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, "the coordinator") from error


async def refused(work: Any) -> Refused:
    """The refusal that a call ends in."""
    try:
        answer = await soon(work)
    except Refused as refusal:
        return refusal
    raise AssertionError(f"not refused: {answer}")


async def fails(work: Any) -> HotweightsError:
    try:
        answer = await soon(work)
    except HotweightsError as error:
        return error
    raise AssertionError(f"did not fail: {answer}")


def manifest_of(name: str, tensors: int = 1) -> bytes:
    """The bytes of a small image's manifest, different for each name."""
    manifest = manifest_pb2.Manifest(format="safetensors", bucket_bytes=16 << 20)
    manifest.files.add(name="model.safetensors", size_bytes=1000, weights=True)
    for i in range(tensors):
        manifest.tensors.add(name=f"{name}.{i}", dtype="BF16", shape=[4, 4], size_bytes=32, digest=b"\7" * 32)
    manifest.buckets.add(size_bytes=1000, digest=b"\1" * 32)
    data: bytes = manifest.SerializeToString(deterministic=True)
    return data


def digest_of(name: str) -> bytes:
    return blake3.blake3(manifest_of(name)).digest()


@dataclass
class Live:
    """A coordinator that runs, and stubs on one channel to it."""

    coordinator: Coordinator
    channel: grpc.aio.Channel
    service: Any
    workers: Any

    @property
    def endpoint(self) -> Endpoint:
        return self.coordinator.endpoint

    @property
    def state(self) -> Any:
        return self.coordinator.runtime.state

    async def publish(self, version: str, blob: bytes | None = None, **header: Any) -> pb.PublishVersionResponse:
        """Publishes an image that is named like the version."""
        blob = manifest_of(version) if blob is None else blob
        fields = {"model": "m", "version": version, "manifest_digest": blake3.blake3(blob).digest(), **header}
        response: pb.PublishVersionResponse = await soon(
            self.service.PublishVersion(parts(pb.PublishHeader(**fields), blob))
        )
        return response

    async def status(self, **request: Any) -> pb.GetStatusResponse:
        response: pb.GetStatusResponse = await soon(self.service.GetStatus(pb.GetStatusRequest(**request)))
        return response


async def parts(header: pb.PublishHeader, blob: bytes) -> AsyncIterator[pb.PublishVersionRequest]:
    yield pb.PublishVersionRequest(header=header)
    for page in pages_of(blob):
        yield pb.PublishVersionRequest(page=page)


def pages_of(blob: bytes) -> list[manifest_pb2.ManifestPage]:
    chunks = [blob[i : i + PAGE_BYTES_MAX] for i in range(0, len(blob), PAGE_BYTES_MAX)]
    return [manifest_pb2.ManifestPage(index=i, count=len(chunks), data=chunk) for i, chunk in enumerate(chunks)]


@asynccontextmanager
async def running(store: str = "memory:", **settings: Any) -> AsyncIterator[Live]:
    config = Config(endpoint=parse_endpoint("127.0.0.1:0"), store=store, **{"stop_grace_s": 1.0, **settings})
    coordinator = Coordinator(config)
    await coordinator.start()
    channel = open_channel(coordinator.endpoint)
    service = rpc.CoordinatorServiceStub(channel)
    workers = worker_service_pb2_grpc.WorkerServiceStub(channel)
    try:
        yield Live(coordinator, channel, service, workers)
    finally:
        await channel.close()
        await coordinator.stop()


class Wire:
    """One raw session stream, message by message."""

    def __init__(self, live: Live) -> None:
        self.call = live.workers.Session()
        self.welcome: worker_service_pb2.Welcome | None = None

    async def say(self, **message: Any) -> None:
        await asyncio.wait_for(self.call.write(worker_service_pb2.SessionRequest(**message)), DEADLINE_S)

    async def hello(self, hello: worker_service_pb2.Hello) -> "Wire":
        """Says Hello and awaits the Welcome. Raises Refused."""
        await self.say(hello=hello)
        first = await self.read()
        assert first.WhichOneof("message") == "welcome"
        self.welcome = first.welcome
        return self

    async def read(self) -> worker_service_pb2.SessionResponse:
        """The next message. Raises Refused or Unreachable at the stream's end."""
        message = await soon(self.call.read())
        if message is grpc.aio.EOF:
            code = await self.call.code()
            raise AssertionError(f"the stream ended with {code}")
        return message  # type: ignore[no-any-return]

    async def order(self, action: str) -> worker_service_pb2.Order:
        """The next order of that kind, past any other."""
        while True:
            message = await self.read()
            if message.order.WhichOneof("action") == action:
                return message.order

    async def report(self, order: worker_service_pb2.Order, **event: Any) -> None:
        report = worker_service_pb2.Report(number=order.number, epoch=order.epoch, update_id=order.update_id, **event)
        await self.say(report=report)

    async def close(self) -> None:
        self.call.cancel()
        await asyncio.wait({asyncio.ensure_future(self.call.code())}, timeout=DEADLINE_S)


def agent_hello(node: str = "n1", *held: str, life: str = "life", **more: Any) -> worker_service_pb2.Hello:
    fields = {"data_endpoint": "tcp://127.0.0.1:9", "token_key": b"k" * 32, **more}
    agent = worker_service_pb2.AgentHello(node_id=node, held_digests=[digest_of(name) for name in held], **fields)
    return worker_service_pb2.Hello(incarnation=life, agent=agent)


def replica_hello(
    replica: str = "r1", active: str = "", *, life: str = "life", node: str = "n1", model: str = "m", **more: Any
) -> worker_service_pb2.Hello:
    fields = {"ranks": [fleet_pb2.Rank(index=0, node_id=node, pid=1)], **more}
    if active:
        fields["active_digest"] = digest_of(active)
    hello = worker_service_pb2.ReplicaHello(replica_id=replica, model=model, **fields)
    return worker_service_pb2.Hello(incarnation=life, replica=hello)


async def until_event(live: Live, kind: fleet_pb2.EventKind) -> fleet_pb2.Event:
    """The first event of that kind in the log, waited for."""
    call = live.service.WatchEvents(pb.WatchEventsRequest(from_revision=1))
    try:
        while True:
            for event in (await soon(call.read())).events:
                if event.kind == kind:
                    return event  # type: ignore[no-any-return]
    finally:
        call.cancel()
