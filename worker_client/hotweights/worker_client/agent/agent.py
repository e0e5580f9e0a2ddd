"""The agent itself: folders, images, the data port and the coordinator, and what they mean to each other.

AgentService (engines, publishers) --+
                                     +--> Agent --> Images (stage), Folders, DataPort
Session (the coordinator's orders) --+         --> Coordinator (manifests, publications)
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from hotweights.transports.threads import in_thread
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2, fleet_pb2, model_pb2
from hotweights.v1 import worker_service_pb2 as worker_pb
from hotweights.wire import failpoints
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent.certificates import peer_tls
from hotweights.worker_client.agent.coordinator import Coordinator
from hotweights.worker_client.agent.data import DataPort
from hotweights.worker_client.agent.folders import Folders, Known
from hotweights.worker_client.agent.images import Images
from hotweights.worker_client.agent.lending import Lending
from hotweights.worker_client.agent.orders import Orders
from hotweights.worker_client.agent.peers import Peer
from hotweights.worker_client.agent.uploads import Uploads
from hotweights.worker_client.config import Config
from hotweights.worker_client.session import Session
from hotweights.worker_client.stage.errors import ImageAltered
from hotweights.worker_client.stage.stage import Stage

log = logging.getLogger(__name__)


class Agent:
    """One node's agent from `start` to `close`. Use from one event loop."""

    def __init__(self, config: Config, stage: Stage) -> None:
        """Raises BadCertificate, BadSetting."""
        self.config = config
        self.stage = stage
        self.folders = Folders(stage.root / "served.json", config.bucket_bytes, self._holdings_changed)
        self.data = DataPort(
            config.node,
            stage,
            self.folders,
            peer_tls(config),
            bandwidth_max=config.bandwidth_max,
            transport=config.transport,
            ucx=config.ucx,
            shared=config.shared,
        )
        self.images = Images(
            stage,
            self.folders,
            self._manifest_of,
            self._holdings_changed,
            self.data.connect,
            self.data.arrived,
            self.data.received,
            bandwidth_max=config.bandwidth_max,
            connections=config.connections,
        )
        self.lending = Lending(stage.pins.clients)
        self._uploads = Uploads(stage, self.lending, config.lend_gpus)
        self.coordinator: Coordinator | None = None
        self.session: Session | None = None
        self.used_at = time.monotonic()
        self._calls = 0
        self._orders: Orders | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._foreseeing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._foreseeing.set_result(0)

    async def start(self, found: list[bytes]) -> None:
        """`found` is what Stage.open gave. Raises OSError, ValueError for a data port that cannot be."""
        tls_only = self.config.endpoint is not None and self.config.endpoint.tls
        await self.data.start(self.config.listen, self.config.advertise, tls_only=tls_only)
        self.images.verify_found(found)
        self._tasks.append(asyncio.ensure_future(self.folders.recall()))
        if self.config.endpoint is not None:
            self.coordinator = Coordinator(self.config.endpoint, self.config.access)
            self.session = Session(
                self.config.endpoint,
                self._hello,
                self._on_order,
                adopt_cluster=self.config.adopt_cluster,
                access=self.config.access,
            )
            self._orders = Orders(self.images, self.session.report)
            self._tasks.append(asyncio.ensure_future(self.session.run()))
        log.info("node %s serves buckets at %s", self.config.node, self.data.endpoint)

    async def close(self) -> None:
        """Ends what is under way; what is verified stays for the next agent."""
        if self.session is not None:
            await self.session.close()
        for task in self._tasks:
            task.cancel()
        self._foreseeing.cancel()
        await asyncio.wait({self._foreseeing})
        if self._orders is not None:
            await self._orders.close()
        await self._uploads.close()
        await self.images.close()
        await self.folders.close()
        await self.data.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def failed(self) -> BaseException | None:
        """What ended a background task that should not have ended."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                return task.exception()
        return None

    # --- for engines and publishers --------------------------------------------------------------

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around every call of a client: an agent in use does not end by itself."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self.used_at = time.monotonic()

    async def publish(self, known: Known, request: pb.PublishFolderRequest, token: str = "") -> model_pb2.Version:
        """Makes a folder that is known a version. Raises Refused, Unreachable, FolderChanged.

        `token` is the publisher's: what it may do is its own matter, not the agent's.
        """
        if self.coordinator is None:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_COORDINATOR",
                "this node's agent has no coordinator; set HOTWEIGHTS_ENDPOINT and restart it",
            )
        failpoints.hit("publish.hashed")
        known.image.check_unchanged()
        # Served before it is declared: whoever hears of the version finds a holder.
        self._holdings_changed()
        self._foresee(known, request.model)
        version = await self.coordinator.publish(
            coordinator_service_pb2.PublishHeader(
                model=request.model,
                version=request.version,
                manifest_digest=known.image.digest,
                request_id=request.request_id,
                start_update=request.start_update,
                options=request.options,
            ),
            known.image.blob,
            token,
        )
        failpoints.hit("publish.declared")
        self.folders.publish_as(known, request.model, request.version)
        self._holdings_changed()
        log.info("%s is published as %s/%s", known.folder, version.model, version.name)
        return version

    def _foresee(self, known: Known, model: str) -> None:
        """Begins with the deltas to the version that was published here before."""
        before = self.folders.published_before(known, model)
        if before is None:
            return
        self._foreseeing.cancel()
        target, base = known.image, before.image
        self._foreseeing = asyncio.ensure_future(in_thread(lambda stop: self.data.foresee(target, base, stop)))
        self._foreseeing.add_done_callback(_told)

    async def map_image(self, digest: bytes, client_id: str) -> Path:
        """Raises NotStaged, ImageAltered, and Refused without a client's id."""
        _require_client(client_id)
        await self.images.settled(digest)
        try:
            return await asyncio.to_thread(self.stage.map, digest, client_id)
        except ImageAltered as error:
            log.error("%s", error.message)
            self._holdings_changed()
            raise

    async def release_image(self, digest: bytes, client_id: str) -> None:
        """Raises Refused for a client that does not map the image."""
        _require_client(client_id)
        if not await asyncio.to_thread(self.stage.release, digest, client_id):
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                "NOT_MAPPED",
                f"client {client_id!r} does not map image {digest.hex()[:16]}",
                client_id=client_id,
                manifest_digest=digest.hex(),
            )

    async def borrow_image(self, digest: bytes, client_id: str, *, upload: bool) -> pb.BorrowImageResponse:
        """GPU memory that holds the image: of another process, else of this one, which may `upload` it for that.

        Raises Refused without a client's id, and where too many borrow.
        """
        _require_client(client_id)
        if upload and await self._uploads.is_coming(digest):
            return pb.BorrowImageResponse(coming=True)
        memories, left_s = self.lending.borrow(digest, client_id)
        return pb.BorrowImageResponse(memories=memories, left_s=left_s)

    def return_image(self, digest: bytes, client_id: str) -> None:
        """Raises Refused without a client's id."""
        _require_client(client_id)
        self.lending.give_back(digest, client_id)

    async def status(self) -> pb.GetAgentStatusResponse:
        images = await asyncio.to_thread(self.stage.images)
        response = pb.GetAgentStatusResponse(
            node_id=self.config.node,
            data_endpoint=self.data.endpoint,
            coordinator_endpoint=str(self.config.endpoint or ""),
            stage_bytes_used=self.stage.used_bytes(),
            stage_bytes_free=self.stage.room().free_bytes,
            pid=os.getpid(),
        )
        for image in images:
            response.images.add(
                manifest_digest=image.digest,
                size_bytes=image.size_bytes,
                client_ids=image.client_ids,
                pinned=image.pinned or bool(image.client_ids),
            )
        for known in self.folders.all():
            for model, version in known.versions or [("", "")]:
                response.folders.add(
                    folder=str(known.folder), manifest_digest=known.image.digest, model=model, version=version
                )
        return response

    # --- for the coordinator ---------------------------------------------------------------------

    def held(self) -> list[bytes]:
        """Images of this node that can be read: staged ones and folders, all verified."""
        return list(dict.fromkeys([*self.stage.held(), *self.folders.digests()]))

    async def is_needed(self) -> bool:
        """Whether it must not end by itself: somebody uses it, or it may be a version's only holder."""
        if self._calls or self.images.is_busy() or await asyncio.to_thread(self.stage.pins.any):
            return True
        last_s = time.monotonic() - max(self.used_at, self.data.served_at)
        if last_s < self.config.agent_idle_s:
            return True
        if self.coordinator is None or not self.held():
            return False
        alone = await self.coordinator.held_only_by(self.config.node)
        if alone:
            log.info("stays: it has the only copy of %s", ", ".join(alone))
        return bool(alone)

    def _hello(self) -> worker_pb.Hello:
        return worker_pb.Hello(
            agent=worker_pb.AgentHello(
                node_id=self.config.node,
                data_endpoint=self.data.endpoint,
                held_digests=self.held(),
                stage_bytes_used=self.stage.used_bytes(),
                stage_bytes_free=self.stage.room().free_bytes,
                token_key=self.data.token_key,
                zone=self.config.zone,
            )
        )

    def note_refused(self, peer: Peer, passed_over: int) -> None:
        """The door turned somebody away: the coordinator's event log has it, as soon as there is a session."""
        if self.session is None:
            return
        refusal = fleet_pb2.Refusal(peer=str(peer), method="connect", reason="PEER_REFUSED", passed_over=passed_over)
        self.session.report(worker_pb.Report(peer_refused=worker_pb.PeerRefused(refusal=refusal)))

    async def _on_order(self, order: worker_pb.Order) -> str:
        if self._orders is None:
            return "the agent is starting"
        return await self._orders.take(order)

    def _holdings_changed(self) -> None:
        if self.session is None:
            return
        held = worker_pb.ImagesHeld(
            digests=self.held(),
            stage_bytes_used=self.stage.used_bytes(),
            stage_bytes_free=self.stage.room().free_bytes,
        )
        self.session.report(worker_pb.Report(images_held=held))

    async def _manifest_of(self, digest: bytes) -> bytes:
        if self.coordinator is None:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION, "NO_COORDINATOR", "manifests of other nodes need a coordinator"
            )
        return await self.coordinator.manifest(digest)


def _told(foreseeing: "asyncio.Future[int]") -> None:
    if not foreseeing.cancelled() and (error := foreseeing.exception()) is not None:
        log.error("making deltas beforehand failed in a way it must not", exc_info=error)


def _require_client(client_id: str) -> None:
    if not client_id or len(client_id) > 128:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BAD_CLIENT_ID",
            "a client's id takes 1 to 128 characters",
            client_id=client_id,
        )
