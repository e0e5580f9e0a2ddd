"""One agent a node: who holds the lock beside the socket is the agent; a socket without one is stale."""

import asyncio
import fcntl
import os
import socket as socketlib
from pathlib import Path

import grpc

from hotweights.wire.errors import Refused

# sun_path: 108 bytes on Linux, 104 on macOS, with the final zero; the door's inner sockets take 4 more (".d/a").
SOCKET_PATH_BYTES_MAX = 99
LOCK_POLL_S = 0.1


class AgentRuns(Refused):
    """There is an agent at this socket already."""

    def __init__(self, socket: Path) -> None:
        super().__init__(
            grpc.StatusCode.ALREADY_EXISTS,
            "AGENT_RUNS",
            f"an agent runs at {socket}; one agent a node",
            socket=str(socket),
        )


def check_socket_path(socket: Path) -> None:
    """Raises Refused for a path that the kernel would not take."""
    if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SOCKET_PATH_TOO_LONG",
            f"socket path {socket} is longer than {SOCKET_PATH_BYTES_MAX} bytes; set HOTWEIGHTS_AGENT_SOCKET",
            socket=str(socket),
        )


async def lock_socket(socket: Path, wait_s: float) -> int:
    """The lock's file descriptor; the kernel lets it go when the process ends. Raises AgentRuns.

    `wait_s` is for an agent that is just ending; one that answers is not.
    """
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(f"{socket}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
    ends_at = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if asyncio.get_running_loop().time() >= ends_at or _answers(socket):
                os.close(handle)
                raise AgentRuns(socket) from error
            await asyncio.sleep(LOCK_POLL_S)
        except BaseException:
            os.close(handle)
            raise
        else:
            return handle


def is_lost(handle: int) -> bool:
    """Whether the lock's file was removed: clients find the socket of another agent, or none."""
    return os.fstat(handle).st_nlink == 0


def _answers(path: Path) -> bool:
    """Whether somebody listens there."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        probe.settimeout(LOCK_POLL_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
