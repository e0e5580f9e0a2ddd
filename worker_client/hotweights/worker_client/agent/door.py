"""The agent's socket: the kernel says who connects, before gRPC hears of him.

    client --> agent.sock --(peers.py: is he on the list?)--+--> inner socket, AgentService
                                                            +--> inner socket, PERMISSION_DENIED to every call

grpc.aio gives no credentials of a unix peer and takes no socket that was accepted elsewhere, so the door
accepts and passes the bytes on. They are few: calls and progress, never weights. The inner sockets lie in a
folder that only the agent's user enters. Connections, buffers and stalled writes all have limits.
"""

import asyncio
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import anyio
import grpc

from hotweights.wire.allowance import Allowance, Rate
from hotweights.wire.channel import server_options
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused, to_metadata
from hotweights.worker_client.agent.peers import AllowList, Peer, peer_of

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
# Of one user on the list; and kept free of all of them for the agent's own user and root.
OF_ONE_OTHER_MAX, RESERVED = 64, 64
BACKLOG = 128
# Buffered of a connection, each way, before its sender has to wait.
RELAY_BYTES = 64 << 10
STALL_S = 30.0
# Who is refused gets time to be told so, and no more.
REFUSED_MAX, REFUSED_S = 16, 5.0
CLOSE_S = 2.0
OF_ONE_USER, OF_ALL_USERS = Rate(burst=5, every_s=60.0), Rate(burst=20, every_s=10.0)

OnRefused = Callable[[Peer, int], None]


def inner_folder(path: Path) -> Path:
    """Where the inner sockets of the socket at `path` are."""
    return path.with_name(f"{path.name}.d")


class Door:
    """From `open` to `close`. The caller holds the lock beside the socket: what lies there is stale."""

    def __init__(self, path: Path, allow: AllowList, on_refused: OnRefused) -> None:
        """`on_refused` hears of refused peers, and how many were passed over since the last: not of each in a flood."""
        self._path = path
        self._allow = allow
        self._on_refused = on_refused
        self._allowance = Allowance(OF_ONE_USER, OF_ALL_USERS)
        self._crowd = Allowance(OF_ONE_USER, OF_ALL_USERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = Counter[int]()  # by user
        self._others_open = self._refused = 0
        self._listening: asyncio.Server | None = None
        self._made: tuple[int, int] | None = None
        self._refusing: grpc.aio.Server | None = None

    @property
    def inner(self) -> Path:
        """Where the agent's server listens."""
        return inner_folder(self._path) / "a"

    @property
    def _refusing_path(self) -> Path:
        return inner_folder(self._path) / "r"

    @property
    def connection_count(self) -> int:
        """Connections of those who are on the list."""
        return self._open.total()

    def prepare(self) -> None:
        """Makes the inner folder; then the agent's server can be bound. Raises Refused, OSError."""
        folder = inner_folder(self._path)
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "FOLDER_UNSAFE",
                f"{folder} is not a folder of user {os.geteuid()}: remove it, or set HOTWEIGHTS_AGENT_SOCKET",
                folder=str(folder),
            )
        folder.chmod(0o700)
        for inner in (self.inner, self._refusing_path):
            inner.unlink(missing_ok=True)

    async def open(self) -> None:
        """Listens. The agent's server listens already. Raises OSError."""
        self._refusing = grpc.aio.server(options=server_options())
        self._refusing.add_generic_rpc_handlers((_RefuseAll(),))
        self._refusing.add_insecure_port(Endpoint(path=str(self._refusing_path)).target)
        await self._refusing.start()
        listener = _listen(self._path, shared=self._allow.has_others)
        self._made = _identity(self._path)
        self._listening = await asyncio.start_unix_server(self._connected, sock=listener, limit=RELAY_BYTES)

    def stop_listening(self) -> None:
        """Nobody new comes in; who is in may finish."""
        if self._listening is not None:
            self._listening.close()

    async def close(self) -> None:
        """Ends every connection, and removes what `prepare` and `open` made, unless another agent came after it."""
        self.stop_listening()
        if self._refusing is not None:
            await self._refusing.stop(None)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        there = _identity(self._path)
        if there is not None and self._made not in (None, there):
            return
        for path in (self._path, self.inner, self._refusing_path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # never made, or not only ours
            inner_folder(self._path).rmdir()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio's, until Python 3.12, calls it an error when one is cancelled.
        task = asyncio.ensure_future(self._accepted(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection failed in a way it must not", exc_info=error)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                peer = peer_of(writer.get_extra_info("socket"))
            except OSError as error:
                log.error("a connection was refused, for the kernel does not say whose it is: %s", error)
                return
            if self._allow.admits(peer):
                await self._let_in(peer, reader, writer)
            else:
                await self._turn_away(peer, reader, writer)

    async def _let_in(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._has_room_for(peer):
            if (passed_over := self._crowd.take(f"uid {peer.uid}")) is not None:
                more = f" ({passed_over} more were closed since the last that was logged)" if passed_over else ""
                opened = f"{self._open[peer.uid]} of his and {self.connection_count} in all are open"
                log.warning("a connection of %s was closed: %s%s", peer, opened, more)
            return
        self._count(peer, 1)
        try:
            await _relay(reader, writer, self.inner)
        finally:
            self._count(peer, -1)

    def _has_room_for(self, peer: Peer) -> bool:
        """Whoever is on the list leaves room for others on it, and all of them for the owner."""
        if self.connection_count >= CONNECTIONS_MAX:
            return False
        if peer.is_owner:
            return True
        return self._open[peer.uid] < OF_ONE_OTHER_MAX and self._others_open < CONNECTIONS_MAX - RESERVED

    def _count(self, peer: Peer, change: int) -> None:
        self._open[peer.uid] += change
        if not peer.is_owner:
            self._others_open += change
        if not self._open[peer.uid]:
            del self._open[peer.uid]

    async def _turn_away(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (passed_over := self._allowance.take(f"uid {peer.uid}")) is not None:
            more = f" ({passed_over} more were refused since the last that was logged)" if passed_over else ""
            log.warning("refused %s, who is not in HOTWEIGHTS_AGENT_ALLOW%s", peer, more)
            self._on_refused(peer, passed_over)
        if self._refused >= REFUSED_MAX:
            return
        self._refused += 1
        try:
            with anyio.move_on_after(REFUSED_S):
                await _relay(reader, writer, self._refusing_path)
        finally:
            self._refused -= 1


def _identity(path: Path) -> tuple[int, int] | None:
    """Of what lies there; no other gets it for as long as a socket that was bound there lives."""
    try:
        state = path.lstat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _listen(path: Path, *, shared: bool) -> socket.socket:
    """A listening socket, 0600 from its first moment; `shared` opens it to all when it is ready: the door decides."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        path.chmod(0o666 if shared else 0o600)
    except BaseException:
        listener.close()
        raise
    return listener


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: Path) -> None:
    """Passes bytes both ways until one side ends or a write stalls; then, and when cancelled, the inner end closes."""
    try:
        inner_reader, inner_writer = await asyncio.open_unix_connection(inner, limit=RELAY_BYTES)
    except OSError as error:  # the agent is ending
        log.info("a connection could not be passed on: %s", error)
        return
    with closing(inner_writer):
        async with anyio.create_task_group() as ways:

            async def way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                await _pass_on(source, sink)
                ways.cancel_scope.cancel()

            ways.start_soon(way, reader, inner_writer)
            ways.start_soon(way, inner_reader, writer)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(RELAY_BYTES):
            writer.write(data)
            with anyio.fail_after(STALL_S):
                await writer.drain()
    except (OSError, TimeoutError) as error:
        log.debug("a connection ended: %s", error or "it took nothing for too long")


class _RefuseAll(grpc.GenericRpcHandler):
    """Answers every call, of any shape, with the refusal."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
    refusal = Refused(
        grpc.StatusCode.PERMISSION_DENIED,
        "PEER_REFUSED",
        f"this agent belongs to user {os.geteuid()} and does not serve yours; where it should, put your uid or @GROUP "
        "into its HOTWEIGHTS_AGENT_ALLOW and restart it",
    )
    await context.abort(refusal.code, refusal.message, to_metadata(refusal))
