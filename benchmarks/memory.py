"""Memory for what is measured: a tmpfs with huge pages, as an operator mounts one for the stage; and none that is new.

In a virtual machine memory that it has not used, or gave back to its host while it was free, costs several times as
much as on a machine of its own.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE_BYTES = 64 << 20


class NoHugePages(Exception):
    """There is none here; why."""


@contextmanager
def huge_pages(size_bytes: int) -> Iterator[Path]:
    """A folder for so many bytes. Raises NoHugePages."""
    folder = Path(tempfile.mkdtemp(prefix="hotweights-bench-"))
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},huge=within_size,mode=0700", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError as error:
            raise NoHugePages(f"mount: {error.strerror}") from None
        if done.returncode:
            raise NoHugePages(f"mount: {done.stderr.strip()}")
        try:
            before = _huge_bytes()
            use_once(folder, size_bytes, lambda: _expect_huge(_huge_bytes() - before, size_bytes))
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], timeout=30, check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def use_once(folder: Path, size_bytes: int, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Takes so much of the memory of a tmpfs, and gives it back; `meanwhile` it is taken."""
    piece, file = bytes(PIECE_BYTES), folder / "used"
    with file.open("wb", buffering=0) as writing:
        writing.truncate(size_bytes)  # huge pages are given within a file's size
        for _ in range(size_bytes // PIECE_BYTES):
            writing.write(piece)
    meanwhile()
    file.unlink()


def _expect_huge(given: int, wanted: int) -> None:
    if given < 0.9 * wanted:
        raise NoHugePages(f"the kernel gave {given >> 20} MiB of {wanted >> 20} in huge pages")


def _huge_bytes() -> int:
    """In files of tmpfs, of the whole machine."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("ShmemHugePages"))
    return int(line.split()[1]) << 10
