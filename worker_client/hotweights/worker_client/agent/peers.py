"""Who is at the other end of a unix socket, as the kernel says, and whether the agent serves him.

The agent's own user and root always; others as HOTWEIGHTS_AGENT_ALLOW lists them: "1001,@vllm,@2000".
"""

import os
import re
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_UID = re.compile("[0-9]{1,10}")
# Linux's asm-generic/socket.h; Python has no name for it.
_SO_PEERGROUPS = 59
# Python hands getsockopt at most 1024 bytes.
_GROUPS_MAX = 256
_CREDENTIALS = struct.Struct("3i")
# macOS, sys/un.h and sys/ucred.h: LOCAL_PEERCRED and LOCAL_PEERPID of SOL_LOCAL, struct xucred.
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 1, 2
_XUCRED = struct.Struct("@IIh16I")


@dataclass(frozen=True)
class Peer:
    """The process that connected, with the rights it had then. `pid` is 0 where it is in another pid namespace."""

    pid: int
    uid: int
    groups: frozenset[int]

    @property
    def is_owner(self) -> bool:
        """Whether he is this process's own user, or root."""
        return self.uid in (0, os.geteuid())

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


@dataclass(frozen=True)
class AllowList:
    """Users and groups beside the agent's own user and root."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    @property
    def has_others(self) -> bool:
        return bool(self.uids or self.gids)

    def admits(self, peer: Peer) -> bool:
        return peer.is_owner or peer.uid in self.uids or not self.gids.isdisjoint(peer.groups)


def parse_allow(text: str) -> AllowList:
    """Reads "UID,@GROUP,...": numbers of users, names or numbers of groups. Raises ValueError, saying which."""
    uids, gids = set[int](), set[int]()
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word.startswith("@"):
            gids.add(_gid(word[1:]))
        elif _UID.fullmatch(word):
            uids.add(int(word))
        else:
            raise ValueError(f"{word!r} is neither a user's number nor @GROUP")
    return AllowList(frozenset(uids), frozenset(gids))


def _gid(name: str) -> int:
    import grp  # not everywhere, and only needed here

    if _UID.fullmatch(name):
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError, UnicodeError) as error:
        raise ValueError(f"there is no group {name!r}") from error


def peer_of(sock: socket.socket) -> Peer:
    """Raises OSError where the kernel does not say."""
    if sys.platform == "darwin":
        return _peer_on_macos(sock)
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    return Peer(pid, uid, frozenset({gid, *_peer_groups(sock)}))


def _peer_groups(sock: socket.socket) -> Iterable[int]:
    """The other groups of the process; none if it has more, or where the kernel (before 4.13) does not say."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _GROUPS_MAX)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def _peer_on_macos(sock: socket.socket) -> Peer:
    """Not exercised by CI, which has no Mac."""
    raw = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size)
    _, uid, count, *groups = _XUCRED.unpack(raw)
    (pid,) = struct.unpack("i", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
    return Peer(pid, uid, frozenset(groups[:count]))
