"""A mapped image tells when its files are no longer what was mapped."""

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from hotweights.adapters.mapped import BadImage, MappedImage  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(64)}, path)
    return path


def test_an_image_that_nobody_touched_is_unaltered(file: Path) -> None:
    MappedImage(file.parent, {}).check_unaltered()


def test_a_byte_that_was_written_is_noticed_though_the_time_was_set_back(file: Path) -> None:
    image, before = MappedImage(file.parent, {}), file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BadImage, match=r"model\.safetensors was altered"):
        image.check_unaltered()


@pytest.mark.parametrize("there", [True, False], ids=["another", "none"])
def test_a_file_in_its_place_is_noticed(file: Path, there: bool) -> None:
    image = MappedImage(file.parent, {})
    content = file.read_bytes()
    file.unlink()
    if there:
        file.write_bytes(content)
    with pytest.raises(BadImage, match="altered"):
        image.check_unaltered()
