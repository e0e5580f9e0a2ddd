"""What can be wrong with an image, as errors whose text is one line that names the file."""

from collections.abc import Sequence
from pathlib import Path


class ImageError(Exception):
    """What every error about images is."""


class BadImage(ImageError):
    """A file, a tensor or a manifest is not what it must be. The publisher has to mend it.

    `file` is a plain name, `tensor` is empty when the problem is the whole file's. All three are texts that a
    log and the wire can take, whatever the file said.
    """

    def __init__(self, file: str, tensor: str, problem: str) -> None:
        file, tensor, problem = map(_as_text, (file, tensor, problem))
        where = f"{file}: tensor {tensor!r}" if tensor else file
        super().__init__(f"{where}: {problem}")
        self.file = file
        self.tensor = tensor
        self.problem = problem


def _as_text(said: str) -> str:
    """Halves of surrogate pairs, which no UTF-8 has, as escapes."""
    return said.encode(errors="backslashreplace").decode()


class FolderChanged(ImageError):
    """A file is no longer the one that was hashed. Publish the folder again, as another version."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(f"{file} in {folder} changed since it was hashed; publish the folder again")
        self.folder = folder
        self.file = file


class ModelNotFound(ImageError):
    """Neither a folder nor a model in the local Hugging Face cache. Nothing is ever downloaded."""

    def __init__(self, name: str, looked_in: Sequence[Path], problem: str) -> None:
        places = ", ".join(str(place) for place in looked_in)
        super().__init__(f"model {name!r}: {problem} (looked in {places})")
        self.name = name
        self.looked_in = tuple(looked_in)
        self.problem = problem
