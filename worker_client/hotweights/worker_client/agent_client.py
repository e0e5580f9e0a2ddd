"""A client of the node's agent: found by its socket, started when there is none, found again when it restarts.

    connect_or_start --socket answers--> AgentClient
          |  nobody there, not in Kubernetes
          +--> python -m hotweights.cli agent --auto   (own session, own log) --> socket answers

Two that start one at once do no harm: the agents race for a lock, and one ends.
"""

import asyncio
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import grpc

from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import agent_service_pb2_grpc as rpc
from hotweights.v1 import model_pb2, update_pb2
from hotweights.wire.access import bearer
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused, Unreachable, from_rpc_error
from hotweights.worker_client.config import Config
from hotweights.worker_client.stage.pins import hold_pin, pin_path
from hotweights.worker_client.stage.stage import safe_folder
from hotweights.worker_client.stage.way import is_everybodys, weak_point

log = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int, int], None]

START_DEADLINE_S = 30.0
START_AGAIN_S = 10.0
SPAWN_DEADLINE_S = 10.0
PROBE_DEADLINE_S = 2.0
CALL_DEADLINE_S = 15.0
LONG_DEADLINE_S = 3600.0
PUBLISH_ATTEMPTS = 5
KEEP_EVERY_S_MAX = 20.0
OUTPUT_SHOWN = 2000
OUTPUT_NAME = "agent.out"


class AgentClient:
    """Calls to the agent. While it is open, the agent does not end for want of clients. Use from one event loop.

    Every method raises Refused (do not try again) and Unreachable (outcome unknown; try again). Nothing is sent to a
    socket at which somebody could listen who is neither this user nor root nor chosen by naming the path.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._what = f"agent at {config.agent_socket}"
        self._channel = open_channel(Endpoint(path=str(config.agent_socket)))
        self._stub = rpc.AgentServiceStub(self._channel)
        self._held: dict[tuple[bytes, str], int] = {}
        self._keeper: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Lets go of every image this client maps."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        for handle in self._held.values():
            os.close(handle)
        self._held.clear()
        await self._channel.close()

    async def identify_folder(self, folder: Path, progress: Progress | None = None) -> bytes:
        """The digest of the folder's image; hashed once, remembered as long as its files do not change."""
        await self.status()  # a long call must not wait long for an agent that is not there
        request = pb.IdentifyFolderRequest(folder=_absolute(folder))
        with self._errors():
            async for part in self._stub.IdentifyFolder(request, timeout=LONG_DEADLINE_S):
                if part.WhichOneof("part") == "manifest_digest":
                    digest: bytes = part.manifest_digest
                    return digest
                if progress is not None:
                    progress(part.progress.bytes_done, part.progress.bytes_total)
        raise Unreachable(self._what, "the call ended without an answer")

    async def stage(self, digest: bytes, progress: Progress | None = None) -> None:
        """Copies an image that this node can read into the stage."""
        await self.status()  # a long call must not wait long for an agent that is not there
        request = pb.StageImageRequest(manifest_digest=digest)
        with self._errors():
            async for part in self._stub.StageImage(request, timeout=LONG_DEADLINE_S):
                if progress is not None:
                    progress(part.bytes_done, part.bytes_total)
                if part.staged:
                    return
        raise Unreachable(self._what, "the call ended without an answer")

    async def map_image(self, digest: bytes, client_id: str) -> Path:
        """The staged image's folder, which stays until `release_image`, `close`, or the end of this process."""
        request = pb.MapImageRequest(manifest_digest=digest, client_id=client_id)
        with self._errors():
            response = await self._stub.MapImage(request, timeout=CALL_DEADLINE_S, wait_for_ready=True)
        folder = Path(response.folder)
        # Anew each time: an agent that lost the image and staged it again has made another pin.
        try:
            handle = await asyncio.to_thread(hold_pin, pin_path(folder.parent, digest, client_id))
        except FileNotFoundError as error:
            raise _not_shared(folder) from error
        before = self._held.pop((digest, client_id), None)
        self._held[digest, client_id] = handle
        if before is not None:
            os.close(before)
        return folder

    async def release_image(self, digest: bytes, client_id: str) -> None:
        """The image is no longer mapped by this client. Releasing one that is not mapped does nothing."""
        handle = self._held.pop((digest, client_id), None)
        if handle is not None:
            os.close(handle)
        request = pb.ReleaseImageRequest(manifest_digest=digest, client_id=client_id)
        try:
            with self._errors():
                await self._stub.ReleaseImage(request, timeout=CALL_DEADLINE_S, wait_for_ready=True)
        except Refused as error:
            if error.reason != "NOT_MAPPED":
                raise

    async def borrow_image(self, digest: bytes, client_id: str, *, upload: bool = False) -> pb.BorrowImageResponse:
        """GPU memory of this node that holds the image; empty where nobody lends it, and where nobody is to borrow.

        With `upload` the agent may begin to: while that is `coming`, ask again.
        """
        if not self._config.use_ipc_agent:
            return pb.BorrowImageResponse()
        request = pb.BorrowImageRequest(manifest_digest=digest, client_id=client_id, upload=upload)
        with self._errors():
            response: pb.BorrowImageResponse = await self._stub.BorrowImage(request, timeout=CALL_DEADLINE_S)
        return response

    async def return_image(self, digest: bytes, client_id: str) -> None:
        """Nothing of this client's reads what was borrowed any more. Of what was not borrowed it does nothing."""
        request = pb.ReturnImageRequest(manifest_digest=digest, client_id=client_id)
        with self._errors():
            await self._stub.ReturnImage(request, timeout=CALL_DEADLINE_S)

    async def lend_image(
        self, digest: bytes, memories: Sequence[pb.DeviceMemory], lease_s: float
    ) -> AsyncGenerator[int, None]:
        """How many borrow it, whenever that changes; it ends when the memory may be freed as far as the agent knows."""
        await self.status()  # a long call must not wait long for an agent that is not there
        request = pb.LendImageRequest(manifest_digest=digest, memories=memories, lease_s=lease_s)
        with self._errors():
            call = self._stub.LendImage(request, timeout=lease_s + CALL_DEADLINE_S)
            try:
                async for part in call:
                    yield part.borrowers
            finally:
                call.cancel()

    async def publish_folder(
        self,
        folder: Path,
        model: str,
        version: str,
        *,
        start_update: bool = False,
        options: update_pb2.UpdateOptions | None = None,
        include_code: bool = False,
        progress: Progress | None = None,
        request_id: str = "",
    ) -> model_pb2.Version:
        """Returns when the version is durable in the coordinator; the agent serves the folder from then on.

        An attempt whose outcome is unknown is repeated under the same `request_id`.
        """
        request = pb.PublishFolderRequest(
            folder=_absolute(folder),
            model=model,
            version=version,
            start_update=start_update,
            options=options,
            request_id=request_id or str(uuid.uuid4()),
            include_code=include_code,
        )
        for attempts_left in reversed(range(PUBLISH_ATTEMPTS)):
            try:
                return await self._publish(request, progress)
            except Unreachable as error:
                if not attempts_left:
                    raise
                log.warning("publishing %s/%s again: %s", model, version, error)
                await asyncio.sleep(1.0)
        raise AssertionError("the last attempt returns or raises")

    async def status(self) -> pb.GetAgentStatusResponse:
        return await self._status(CALL_DEADLINE_S, wait_for_ready=True)

    async def probe(self) -> pb.GetAgentStatusResponse:
        """As `status`, but an agent that is not there is Unreachable at once."""
        return await self._status(PROBE_DEADLINE_S, wait_for_ready=False)

    def keep(self) -> None:
        """From now on, the agent hears of this client, and one that ended is started again (not in Kubernetes)."""
        self._keeper = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        every_s = max(0.1, min(KEEP_EVERY_S_MAX, self._config.agent_idle_s / 3))
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.probe()
            except Refused as error:
                log.warning("%s", error)
            except Unreachable as error:
                log.warning("%s", error)
                if not self._config.in_kubernetes:
                    with suppress(Refused, Unreachable):  # said above; tried again in a while
                        await _start(self._config, self)

    async def _status(self, deadline_s: float, *, wait_for_ready: bool) -> pb.GetAgentStatusResponse:
        with self._errors():
            response: pb.GetAgentStatusResponse = await self._stub.GetAgentStatus(
                pb.GetAgentStatusRequest(), timeout=deadline_s, wait_for_ready=wait_for_ready
            )
        return response

    async def _publish(self, request: pb.PublishFolderRequest, progress: Progress | None) -> model_pb2.Version:
        await self.status()
        with self._errors():
            # The publisher's own token, for the agent to pass on: the agent's may not be allowed to publish.
            shown = bearer(self._config.access.read_token())
            async for part in self._stub.PublishFolder(request, timeout=LONG_DEADLINE_S, metadata=shown):
                if part.WhichOneof("part") == "version":
                    published: model_pb2.Version = part.version
                    return published
                if progress is not None:
                    progress(part.progress.bytes_done, part.progress.bytes_total)
        raise Unreachable(self._what, "the call ended without an answer")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        self._check_socket()
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._what) from error

    def _check_socket(self) -> None:
        """At every call: what is made after one look at it would be seen by the next only.

        Raises Refused, and Unreachable where the socket's folder is not there: whoever makes it then is not known.
        """
        socket, in_pod = self._config.agent_socket, self._config.in_kubernetes
        problem = weak_point(socket, in_pod=in_pod)
        try:
            if not problem and not in_pod and is_everybodys(socket.parent):
                problem = f"everybody may listen in {socket.parent}"
        except OSError as error:
            raise Unreachable(self._what, f"{socket.parent}: {error.strerror}") from error
        if problem:
            raise _socket_unsafe(socket, problem)


def _absolute(folder: Path) -> str:
    """The agent has another working directory."""
    return str(folder.expanduser().absolute())


async def connect_or_start(config: Config) -> AgentClient:
    """A client of this node's agent; starts one when there is none.

    Raises Refused where that must not be (Kubernetes) or when the agent follows another coordinator,
    Unreachable when it does not answer within 30 s.
    """
    client = AgentClient(config)
    try:
        try:
            status = await client.probe()
        except Unreachable as error:
            if config.in_kubernetes:
                raise _no_agent(config) from error
            status = await _start(config, client)
        _check_coordinator(config, status)
    except BaseException:
        await client.close()
        raise
    client.keep()
    return client


async def _start(config: Config, client: AgentClient) -> pb.GetAgentStatusResponse:
    """Starts an agent, and another if none answers after a while, until the deadline."""
    loop = asyncio.get_running_loop()
    ends_at, starts_at = loop.time() + START_DEADLINE_S, 0.0
    safe_folder(config.stage_dir, in_pod=config.in_kubernetes)
    (config.stage_dir / OUTPUT_NAME).write_bytes(b"")
    while True:
        if loop.time() >= starts_at:
            await asyncio.to_thread(_spawn, config)
            starts_at = loop.time() + START_AGAIN_S
        try:
            return await client.probe()
        except Unreachable as error:
            if loop.time() > ends_at:
                raise Unreachable(f"agent at {config.agent_socket}", _why_not(config)) from error
        await asyncio.sleep(0.2)


def _spawn(config: Config) -> None:
    """An agent in a session of its own, with our settings, nothing of our stdio, and its output in the stage.

    A shell in between puts it in the background and ends: it is nobody's child here, and leaves no zombie.
    """
    # env(1) adds our settings to what a child inherits: they may have come by argument.
    settings = [f"{name}={value}" for name, value in config.as_environ().items()]
    agent = ["/usr/bin/env", *settings, sys.executable, "-m", "hotweights.cli", "agent", "--auto"]
    with (config.stage_dir / OUTPUT_NAME).open("ab") as output:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *agent],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            check=True,
            timeout=SPAWN_DEADLINE_S,
        )


def _why_not(config: Config) -> str:
    with suppress(OSError):
        text = (config.stage_dir / OUTPUT_NAME).read_text(errors="replace").strip()
        if text:
            return f"it was started and does not answer; its output ends: {text[-OUTPUT_SHOWN:]}"
    return f"it was started and does not answer; see {config.stage_dir}/agent.log"


def _socket_unsafe(socket: Path, problem: str) -> Refused:
    return Refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SOCKET_UNSAFE",
        f"who listens at {socket} cannot be trusted: {problem}; remove it, or set HOTWEIGHTS_STAGE_DIR or "
        "HOTWEIGHTS_AGENT_SOCKET",
        socket=str(socket),
    )


def _not_shared(folder: Path) -> Refused:
    return Refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        "STAGE_NOT_SHARED",
        f"the agent staged {folder}, which this process does not see: mount the agent's stage at the same path",
        folder=str(folder),
    )


def _no_agent(config: Config) -> Refused:
    return Refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_AGENT",
        f"no agent answers at {config.agent_socket}. In Kubernetes none is started automatically: run "
        "`hotweights agent` as a DaemonSet or sidecar that shares a memory-backed volume and the socket with this "
        "pod, and set HOTWEIGHTS_NODE, HOTWEIGHTS_STAGE_DIR and HOTWEIGHTS_AGENT_SOCKET in both",
        socket=str(config.agent_socket),
    )


def _one_name(endpoint: str) -> str:
    """This machine has two names that people mix."""
    return endpoint.replace("//localhost:", "//127.0.0.1:")


def _check_coordinator(config: Config, status: pb.GetAgentStatusResponse) -> None:
    ours = str(config.endpoint) if config.endpoint is not None else ""
    if ours and _one_name(ours) != _one_name(status.coordinator_endpoint):
        follows = status.coordinator_endpoint or "no coordinator"
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            "OTHER_COORDINATOR",
            f"the agent at {config.agent_socket} (pid {status.pid}) follows {follows}, not {ours}; end it, or give "
            "this process another HOTWEIGHTS_AGENT_SOCKET and HOTWEIGHTS_STAGE_DIR",
            agent=status.coordinator_endpoint,
            asked=ours,
        )
