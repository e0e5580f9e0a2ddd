"""AgentService on the unix socket: thin, each call is one of the agent's."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import agent_service_pb2_grpc as rpc
from hotweights.wire import failpoints
from hotweights.wire.access import bearer_of
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent.agent import Agent
from hotweights.worker_client.agent.edge import statuses

HASH_DEADLINE_S = 3600.0
STAGE_DEADLINE_S = 3600.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AgentServicer(rpc.AgentServiceServicer):
    """What engines and publishers of this node call."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def PublishFolder(
        self, request: pb.PublishFolderRequest, context: Context
    ) -> AsyncIterator[pb.PublishFolderResponse]:
        async with statuses(context):
            with self._agent.in_use():
                folder = _folder(request.folder)
                for field in ("model", "version"):
                    if not getattr(request, field):
                        raise _bad(f"{field} is missing")
                failpoints.hit("publish.begin")
                work = self._agent.folders.hash(folder, include_code=request.include_code)
                async for bytes_done, bytes_total in work.follow(HASH_DEADLINE_S):
                    progress = pb.HashProgress(bytes_done=bytes_done, bytes_total=bytes_total)
                    yield pb.PublishFolderResponse(progress=progress)
                token = bearer_of(context.invocation_metadata() or ())
                version = await self._agent.publish(work.task.result(), request, token)
                yield pb.PublishFolderResponse(version=version)

    async def IdentifyFolder(
        self, request: pb.IdentifyFolderRequest, context: Context
    ) -> AsyncIterator[pb.IdentifyFolderResponse]:
        async with statuses(context):
            with self._agent.in_use():
                work = self._agent.folders.hash(_folder(request.folder))
                async for bytes_done, bytes_total in work.follow(HASH_DEADLINE_S):
                    progress = pb.HashProgress(bytes_done=bytes_done, bytes_total=bytes_total)
                    yield pb.IdentifyFolderResponse(progress=progress)
                yield pb.IdentifyFolderResponse(manifest_digest=work.task.result().image.digest)

    async def StageImage(self, request: pb.StageImageRequest, context: Context) -> AsyncIterator[pb.StageImageResponse]:
        async with statuses(context):
            with self._agent.in_use():
                work = self._agent.images.begin(_digest(request.manifest_digest), [])
                async for bytes_done, bytes_total in work.follow(STAGE_DEADLINE_S):
                    yield pb.StageImageResponse(bytes_done=bytes_done, bytes_total=bytes_total)
                work.task.result()
                bytes_done, bytes_total = work.figures.read()
                yield pb.StageImageResponse(bytes_done=bytes_done, bytes_total=bytes_total, staged=True)

    async def MapImage(self, request: pb.MapImageRequest, context: Context) -> pb.MapImageResponse:
        async with statuses(context):
            with self._agent.in_use():
                folder = await self._agent.map_image(_digest(request.manifest_digest), request.client_id)
        return pb.MapImageResponse(folder=str(folder))

    async def ReleaseImage(self, request: pb.ReleaseImageRequest, context: Context) -> pb.ReleaseImageResponse:
        async with statuses(context):
            with self._agent.in_use():
                await self._agent.release_image(_digest(request.manifest_digest), request.client_id)
        return pb.ReleaseImageResponse()

    async def LendImage(self, request: pb.LendImageRequest, context: Context) -> AsyncIterator[pb.LendImageResponse]:
        async with statuses(context):
            with self._agent.in_use():
                async for borrowers in self._agent.lending.lend(request):
                    yield pb.LendImageResponse(borrowers=borrowers)

    async def BorrowImage(self, request: pb.BorrowImageRequest, context: Context) -> pb.BorrowImageResponse:
        async with statuses(context):
            with self._agent.in_use():
                digest = _digest(request.manifest_digest)
                response = await self._agent.borrow_image(digest, request.client_id, upload=request.upload)
        return response

    async def ReturnImage(self, request: pb.ReturnImageRequest, context: Context) -> pb.ReturnImageResponse:
        async with statuses(context):
            with self._agent.in_use():
                self._agent.return_image(_digest(request.manifest_digest), request.client_id)
        return pb.ReturnImageResponse()

    async def GetAgentStatus(self, request: pb.GetAgentStatusRequest, context: Context) -> pb.GetAgentStatusResponse:
        async with statuses(context):
            with self._agent.in_use():
                response = await self._agent.status()
        return response


def _bad(problem: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", problem)


def _digest(digest: bytes) -> bytes:
    if len(digest) != 32:
        raise _bad(f"a manifest's digest has 32 bytes, not {len(digest)}")
    return digest


def _folder(text: str) -> Path:
    folder = Path(text)
    if not folder.is_absolute():
        raise _bad(f"folder {text!r}: the agent needs the absolute path")
    if not folder.is_dir():
        raise Refused(
            grpc.StatusCode.NOT_FOUND, "NO_SUCH_FOLDER", f"there is no folder {text} on this node", folder=text
        )
    return folder
