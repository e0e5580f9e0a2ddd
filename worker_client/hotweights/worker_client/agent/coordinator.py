"""What the agent asks of the coordinator: manifests, publications, and who holds what."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import model_pb2
from hotweights.wire.access import ANONYMOUS, Access
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.problems import call_error
from hotweights.worker_client.image.paging import PageJoiner, pages

CALL_DEADLINE_S = 10.0
MANIFEST_DEADLINE_S = 120.0
PUBLISH_DEADLINE_S = 120.0
PAGES_OF_VERSIONS_MAX = 1000


class Coordinator:
    """CoordinatorService at an endpoint. Raises Refused and Unreachable.

    A channel a call: calls are rare, an agent lives for months, and files of `access` that changed are read anew.
    """

    def __init__(self, endpoint: Endpoint, access: Access = ANONYMOUS) -> None:
        self.endpoint = endpoint
        self._access = access

    async def manifest(self, digest: bytes) -> bytes:
        """The serialised manifest that `digest` names. Raises BadImage too."""
        request = pb.GetManifestRequest(manifest_digest=digest)
        joiner = PageJoiner()
        async with self._stub(self._access) as stub:
            async for response in stub.GetManifest(request, timeout=MANIFEST_DEADLINE_S):
                joiner.add(response.page)
        return joiner.blob(digest)

    async def publish(self, header: pb.PublishHeader, blob: bytes, token: str = "") -> model_pb2.Version:
        """Returns when the version is durable. `token` is the publisher's, shown in place of the agent's own."""

        async def parts() -> AsyncIterator[pb.PublishVersionRequest]:
            yield pb.PublishVersionRequest(header=header)
            for page in pages(blob):
                yield pb.PublishVersionRequest(page=page)

        access = dataclasses.replace(self._access, token=token, token_file=None) if token else self._access
        async with self._stub(access) as stub:
            response = await stub.PublishVersion(parts(), timeout=PUBLISH_DEADLINE_S)
        version: model_pb2.Version = response.version
        return version

    async def held_only_by(self, node_id: str) -> list[str]:
        """Versions ("model/version") of which this node has the only copy."""
        alone: list[str] = []
        token = ""
        async with self._stub(self._access) as stub:
            for _ in range(PAGES_OF_VERSIONS_MAX):
                request = pb.ListVersionsRequest(page_token=token)
                response = await stub.ListVersions(request, timeout=CALL_DEADLINE_S)
                alone += [f"{v.model}/{v.name}" for v in response.versions if list(v.holder_node_ids) == [node_id]]
                token = response.next_page_token
                if not token:
                    break
        return alone

    @contextlib.asynccontextmanager
    async def _stub(self, access: Access) -> AsyncIterator[Any]:
        try:
            async with open_channel(self.endpoint, access) as channel:
                yield rpc.CoordinatorServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.endpoint, access) from error
