"""Whether a file is still the one that was hashed, told without reading it."""

import os
from io import FileIO
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Changes when a file is replaced, grows, shrinks or is written to."""

    inode: int
    size_bytes: int
    mtime_ns: int


def read_stamp(path: Path) -> Stamp:
    """The stamp of the file at `path`, links followed. Raises OSError."""
    return _stamp(path.stat())


def stamp_of(file: FileIO) -> Stamp:
    """The stamp of an open file: of the bytes that reading it gives, whatever its path is by now."""
    return _stamp(os.fstat(file.fileno()))


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
