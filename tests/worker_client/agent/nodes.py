"""Real agents on real sockets, and a small real coordinator whose orders a test gives."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from tests.certificates import Files

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import (
    coordinator_service_pb2_grpc,
    model_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from hotweights.wire.channel import server_options
from hotweights.wire.errors import Refused, Unreachable, to_metadata
from hotweights.wire.tokens import make_token
from hotweights.worker_client.agent.process import serve_agent
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import Config, load_config
from hotweights.worker_client.image.paging import PageJoiner, pages

CELL_S = 15.0


def a_config(folder: Path, node: str, endpoint: str = "", **environ: str) -> Config:
    return load_config(
        {
            "HOTWEIGHTS_NODE": node,
            "HOTWEIGHTS_STAGE_DIR": str(folder / node),
            "HOTWEIGHTS_ENDPOINT": endpoint,
            "HOTWEIGHTS_BUCKET_BYTES": "65536",
            **environ,
        }
    )


async def until(holds: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + CELL_S
    while not holds():
        assert time.monotonic() < ends_at, f"after {CELL_S} s still not so: {what}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def agent_of(config: Config, *, started_by_client: bool = False, **settings: Any) -> AsyncIterator[AgentClient]:
    """A running agent and a client of it."""
    stop = asyncio.Event()
    running = asyncio.ensure_future(serve_agent(config, started_by_client=started_by_client, stop=stop, **settings))
    client = AgentClient(config)
    try:
        await answering(client, running)
        yield client
    finally:
        await client.close()
        stop.set()
        await asyncio.wait_for(running, CELL_S)


async def answering(client: AgentClient, running: "asyncio.Future[None]") -> None:
    ends_at = time.monotonic() + CELL_S
    while True:
        if running.done():
            running.result()
        try:
            await client.probe()
        except Unreachable:
            assert time.monotonic() < ends_at
            await asyncio.sleep(0.05)
        else:
            return


class SmallCoordinator(
    worker_service_pb2_grpc.WorkerServiceServicer, coordinator_service_pb2_grpc.CoordinatorServiceServicer
):
    """Keeps manifests and versions in memory, gives the orders it is told to, and remembers what agents said."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.manifests: dict[bytes, bytes] = {}
        self.versions: dict[tuple[str, str], model_pb2.Version] = {}
        self.hellos: dict[str, worker_service_pb2.AgentHello] = {}
        self.held: dict[str, list[bytes]] = {}
        self.reports: dict[str, list[worker_service_pb2.Report]] = {}
        self.answers: list[worker_service_pb2.Answer] = []
        self._orders: dict[str, asyncio.Queue[worker_service_pb2.Order]] = {}
        self._numbers = itertools.count(1)
        # Of every session and publication: which it was, and the authorization that it showed.
        self.shown: list[tuple[str, str]] = []

    # --- what tests use --------------------------------------------------------------------------

    def order(self, node: str, **action: Any) -> int:
        number = next(self._numbers)
        self._orders[node].put_nowait(worker_service_pb2.Order(number=number, nonce=number, epoch=1, **action))
        return number

    def stage(
        self, node: str, digest: bytes, *sources: str, deadline_s: float = 30.0, staging: str | None = None
    ) -> int:
        """`staging` is the source that gets the image itself."""
        stage = worker_service_pb2.StageImage(manifest_digest=digest, deadline_s=deadline_s)
        for name in sources:
            hello = self.hellos[name]
            token = make_token(hello.token_key, digest, node, name, int(time.time()) + 60)
            endpoint = hello.data_endpoint
            stage.sources.add(node_id=name, data_endpoint=endpoint, token=token, staging=name == staging)
        return self.order(node, stage=stage)

    async def outcome(self, node: str, number: int) -> worker_service_pb2.Report:
        """The report that ends an order."""

        def ended() -> list[worker_service_pb2.Report]:
            said = [report for report in self.reports[node] if report.number == number]
            return [report for report in said if report.WhichOneof("event") in ("staged", "stage_failed")]

        await until(lambda: bool(ended()), f"order {number} ended")
        return ended()[0]

    def progress(self, node: str, number: int) -> int:
        """Bytes that the node has of what an order is about, as it says."""
        said = [report for report in self.reports[node] if report.number == number]
        return max((report.stage_progress.bytes_done for report in said), default=0)

    async def hears(self, *nodes: str) -> None:
        await until(lambda: all(node in self.hellos for node in nodes), f"{nodes} said hello")

    def holders(self, digest: bytes) -> list[str]:
        return sorted(node for node, digests in self.held.items() if digest in digests)

    # --- what agents call ------------------------------------------------------------------------

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[worker_service_pb2.SessionResponse]:
        self._remember("Session", context)
        first = await anext(aiter(requests))
        hello = first.hello.agent
        self.hellos[hello.node_id] = hello
        self.held[hello.node_id] = list(hello.held_digests)
        self.reports.setdefault(hello.node_id, [])
        orders = self._orders[hello.node_id] = asyncio.Queue(100)
        reading = asyncio.ensure_future(self._read(requests, hello.node_id))
        try:
            yield worker_service_pb2.SessionResponse(
                welcome=worker_service_pb2.Welcome(session_id="s", cluster_id="c", epoch=1, heartbeat_s=1, lease_s=5)
            )
            while True:
                yield worker_service_pb2.SessionResponse(order=await orders.get())
        finally:
            reading.cancel()
            self.hellos.pop(hello.node_id, None)
            self.held.pop(hello.node_id, None)

    def _remember(self, method: str, context: Any) -> None:
        self.shown.append((method, str(dict(context.invocation_metadata()).get("authorization", ""))))

    async def _read(self, requests: Any, node: str) -> None:
        async for request in requests:
            if request.WhichOneof("message") == "answer":
                self.answers.append(request.answer)
            elif request.WhichOneof("message") == "report":
                self.reports[node].append(request.report)
                if request.report.WhichOneof("event") == "images_held":
                    self.held[node] = list(request.report.images_held.digests)

    async def PublishVersion(self, requests: Any, context: Any) -> pb.PublishVersionResponse:
        self._remember("PublishVersion", context)
        header, joiner = pb.PublishHeader(), PageJoiner()
        async for request in requests:
            if request.WhichOneof("part") == "header":
                header = request.header
            else:
                joiner.add(request.page)
        self.manifests[header.manifest_digest] = joiner.blob(header.manifest_digest)
        known = self.versions.get((header.model, header.version))
        if known is not None and known.manifest_digest != header.manifest_digest:
            refused = Refused(grpc.StatusCode.ALREADY_EXISTS, "VERSION_EXISTS", "it is there with another digest")
            await context.abort(refused.code, refused.message, to_metadata(refused))
        version = model_pb2.Version(
            model=header.model, name=header.version, sequence=1, manifest_digest=header.manifest_digest
        )
        self.versions[header.model, header.version] = version
        return pb.PublishVersionResponse(version=version)

    async def GetManifest(self, request: Any, context: Any) -> AsyncIterator[pb.GetManifestResponse]:
        if request.manifest_digest not in self.manifests:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such manifest")
        for page in pages(self.manifests[request.manifest_digest]):
            yield pb.GetManifestResponse(page=page)

    async def ListVersions(self, request: Any, context: Any) -> pb.ListVersionsResponse:
        return pb.ListVersionsResponse(versions=[self._shown(version) for version in self.versions.values()])

    async def GetVersion(self, request: Any, context: Any) -> pb.GetVersionResponse:
        version = self.versions.get((request.model, request.version))
        if version is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such version")
            raise AssertionError("abort raises")
        return pb.GetVersionResponse(version=self._shown(version))

    def _shown(self, version: model_pb2.Version) -> model_pb2.Version:
        shown = model_pb2.Version()
        shown.CopyFrom(version)
        del shown.holder_node_ids[:]
        shown.holder_node_ids.extend(self.holders(version.manifest_digest))
        return shown


@contextlib.asynccontextmanager
async def a_coordinator(files: Files | None = None) -> AsyncIterator[SmallCoordinator]:
    """Over mutual TLS with `files`."""
    small = SmallCoordinator()
    server = grpc.aio.server(options=server_options())
    coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server(small, server)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(small, server)
    if files is None:
        small.endpoint = f"tcp://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        pair = (files.key.read_bytes(), files.cert.read_bytes())
        credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
        small.endpoint = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    try:
        yield small
    finally:
        await server.stop(0.2)
