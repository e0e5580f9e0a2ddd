"""Whether somebody wrote to a staged image after its bytes were verified, told without reading it."""

from pathlib import Path

from hotweights.v1 import manifest_pb2

Stamps = tuple[tuple[int, int, int, int] | None, ...]


def stamps_of(folder: Path, manifest: manifest_pb2.Manifest) -> Stamps:
    """One a file of the manifest: inode, size, times of change. Nobody but us has a reason to touch these files.

    The time of the last write can be set back, that of the last change of the inode cannot.
    """
    return tuple(_stamp(folder / file.name) for file in manifest.files)


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
