"""What the agent asks of the coordinator: manifests, publications, and who holds what."""

from collections.abc import AsyncIterator

import grpc

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import model_pb2
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import HotweightsError, from_rpc_error
from hotweights.worker_client.image.paging import PageJoiner, pages

CALL_DEADLINE_S = 10.0
MANIFEST_DEADLINE_S = 120.0
PUBLISH_DEADLINE_S = 120.0
PAGES_OF_VERSIONS_MAX = 1000


class Coordinator:
    """A channel to CoordinatorService. Raises Refused and Unreachable."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._channel = open_channel(endpoint)
        self._stub = rpc.CoordinatorServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def manifest(self, digest: bytes) -> bytes:
        """The serialised manifest that `digest` names. Raises BadImage too."""
        request = pb.GetManifestRequest(manifest_digest=digest)
        joiner = PageJoiner()
        try:
            async for response in self._stub.GetManifest(request, timeout=MANIFEST_DEADLINE_S):
                joiner.add(response.page)
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error) from error
        return joiner.blob(digest)

    async def publish(self, header: pb.PublishHeader, blob: bytes) -> model_pb2.Version:
        """Returns when the version is durable."""

        async def parts() -> AsyncIterator[pb.PublishVersionRequest]:
            yield pb.PublishVersionRequest(header=header)
            for page in pages(blob):
                yield pb.PublishVersionRequest(page=page)

        try:
            response = await self._stub.PublishVersion(parts(), timeout=PUBLISH_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error) from error
        version: model_pb2.Version = response.version
        return version

    async def held_only_by(self, node_id: str) -> list[str]:
        """Versions ("model/version") of which this node has the only copy."""
        alone: list[str] = []
        token = ""
        for _ in range(PAGES_OF_VERSIONS_MAX):
            request = pb.ListVersionsRequest(page_token=token)
            try:
                response = await self._stub.ListVersions(request, timeout=CALL_DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                raise self._mapped(error) from error
            alone += [f"{v.model}/{v.name}" for v in response.versions if list(v.holder_node_ids) == [node_id]]
            token = response.next_page_token
            if not token:
                break
        return alone

    def _mapped(self, error: grpc.aio.AioRpcError) -> HotweightsError:
        return from_rpc_error(error, f"coordinator {self.endpoint}")
