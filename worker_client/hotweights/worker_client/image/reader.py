"""Ranges of an image's files, for those who fetch them: read first, then proven to be what was hashed."""

import errno
import os
from io import FileIO

from hotweights.worker_client.image.errors import FolderChanged
from hotweights.worker_client.image.manifest import Image
from hotweights.worker_client.image.stamps import stamp_of

# The largest bucket; nobody has reason to ask for more at once.
RANGE_BYTES_MAX = 1 << 30


class BucketReader:
    """Reads files by their number in the manifest. Keeps nothing open; safe in several threads. Blocks."""

    def read_range(self, image: Image, file_index: int, offset: int, size: int) -> memoryview:
        """The bytes, in memory of their own. Raises FolderChanged, and ValueError for a range that is not there."""
        _name_of(image, file_index, offset, size)  # before there is memory for it
        data = memoryview(bytearray(size))
        self.read_into(image, file_index, offset, data)
        return data.toreadonly()

    def read_into(self, image: Image, file_index: int, offset: int, into: memoryview) -> None:
        """As read_range, into memory that is there: new pages take longer than what is read into them."""
        name = _name_of(image, file_index, offset, len(into))
        try:
            with FileIO(image.paths[file_index], opener=_open_no_link) as file:
                _read_full(file, offset, into, image, name)
                # Of the open file: its path may lead to another by now. After reading: it covers both.
                if stamp_of(file) != image.stamps[file_index]:
                    raise FolderChanged(image.folder, name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise FolderChanged(image.folder, name) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FolderChanged(image.folder, name) from None
            raise


def _open_no_link(path: str, flags: int) -> int:
    """What is a link now was none when its content was hashed."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _name_of(image: Image, file_index: int, offset: int, size: int) -> str:
    """Of the file that has a range. Raises ValueError where none has it."""
    files = image.manifest.files
    if not 0 <= file_index < len(files):
        raise ValueError(f"there is no file {file_index}; the image has {len(files)}")
    name, end = files[file_index].name, files[file_index].size_bytes
    if offset < 0 or not 0 < size <= RANGE_BYTES_MAX or offset + size > end:
        raise ValueError(f"{name} has {end} bytes, not {size} from {offset} on")
    return name


def _read_full(file: FileIO, offset: int, into: memoryview, image: Image, name: str) -> None:
    file.seek(offset)
    at = 0
    while at < len(into):
        got = file.readinto(into[at:])
        if not got:
            raise FolderChanged(image.folder, name)
        at += got
