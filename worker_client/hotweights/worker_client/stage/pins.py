"""Who maps an image: a file for each client, locked by that client for as long as it maps.

    <stage>/pins/<digest>/<client>      made by the agent at MapImage, gone at ReleaseImage
                                        flock(LOCK_SH) held by the client's process and its ranks

The kernel lets a lock go when its holders end, whichever way, so an engine that was killed keeps
no image, and a pin outlives the agent. A client has `GRACE_S` from MapImage to take its lock.
"""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path
from urllib.parse import quote, unquote

GRACE_S = 30.0
LOCK_ATTEMPTS = 100


def pin_path(stage: Path, digest: bytes, client_id: str) -> Path:
    """The client's pin. The id is quoted, so that no id leaves the folder."""
    return stage / "pins" / digest.hex() / f"c-{quote(client_id, safe='')}"


def hold_pin(path: Path) -> int:
    """Takes the client's side of a pin: a file descriptor to close at release. Blocks for up to a second."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    for attempts_left in reversed(range(LOCK_ATTEMPTS)):
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # the agent holds it for an instant when it looks who is alive
            if not isinstance(error, BlockingIOError) or not attempts_left:
                os.close(handle)
                raise
            time.sleep(0.01)
        else:
            break
    return handle


class Pins:
    """The agent's side."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage

    def add(self, digest: bytes, client_id: str) -> None:
        path = pin_path(self._stage, digest, client_id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        os.utime(path)

    def remove(self, digest: bytes, client_id: str) -> bool:
        """Whether there was such a pin."""
        try:
            pin_path(self._stage, digest, client_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def clients(self, digest: bytes) -> list[str]:
        """Clients that map the image now; pins of clients that ended are removed."""
        folder = self._stage / "pins" / digest.hex()
        if not folder.is_dir():
            return []
        return sorted(unquote(path.name[2:]) for path in folder.iterdir() if _alive(path))

    def any(self) -> bool:
        """Whether anybody maps anything."""
        folder = self._stage / "pins"
        return folder.is_dir() and any(self.clients(bytes.fromhex(image.name)) for image in folder.iterdir())

    def forget(self, digest: bytes) -> None:
        """The image is gone."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._stage / "pins" / digest.hex())


def _alive(path: Path) -> bool:
    """Whether a client holds the pin's lock or may still take it; removes the pin if not."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        if time.time() - os.fstat(handle).st_mtime < GRACE_S:
            return True
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)
