"""The way to the stage and to the agent's socket: whether somebody whom nobody chose could stand at its end.

    /dev/shm (everybody makes entries, sticky) --> hotweights-1001 (root's or ours, or not believed) --> agent.sock

Where everybody may make entries, whoever is first has the name: there only our own user's and root's entries count.
Elsewhere an entry is of whoever the folder's owner lets have it, and by naming the path one believes him. Groups that
may write to a folder on the way are believed with its owner.
"""

import os
import stat
from itertools import pairwise
from pathlib import Path


def weak_point(path: Path, *, in_pod: bool = False) -> str:
    """What is wrong with the way to `path`, or "". Nothing is said of what is not there (yet).

    `in_pod`: the kubelet makes volumes that everybody in the pod may write to, and who is in the pod its author says.
    """
    named = path.absolute()
    for way in (named, Path(os.path.realpath(named))):  # the links on the way, and where they lead
        for folder, entry in pairwise([*reversed(way.parents), way]):
            if problem := _weakness(folder, entry, in_pod):
                return problem
    return ""


def is_everybodys(folder: Path) -> bool:
    """Whether everybody may make entries in it. Raises OSError."""
    return bool(folder.stat().st_mode & stat.S_IWOTH)


def _weakness(folder: Path, entry: Path, in_pod: bool) -> str:
    try:
        mode = folder.stat().st_mode
        if not mode & stat.S_IWOTH:
            return ""
        if not mode & stat.S_ISVTX:
            return "" if in_pod else f"everybody may write to {folder}, and so put another {entry.name} there"
        owner = entry.lstat().st_uid
    except OSError:  # not there, or nothing that we could go through
        return ""
    if owner in _believed():
        return ""
    return f"{entry} belongs to user {owner}, and everybody may make entries in {folder}"


def _believed() -> set[int]:
    """Whoever owns the root folder is root, by whatever number a user namespace shows him."""
    return {0, os.geteuid(), os.stat("/").st_uid}
