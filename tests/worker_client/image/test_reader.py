"""Ranges of a published folder: served as they were hashed, or not at all."""

import os
from pathlib import Path

import pytest
from tests.worker_client.image.files import make_folder, make_hf_cache
from tests.worker_client.image.test_manifest import CHANGES, rewrite_in_place

from hotweights.worker_client.image import BucketReader, FolderChanged, Image, build_manifest
from hotweights.worker_client.image import reader as reader_module


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return build_manifest(make_folder(tmp_path / "model"), bucket_bytes=4096)


def weights(image: Image) -> int:
    return next(number for number, file in enumerate(image.manifest.files) if file.weights)


def test_every_bucket_is_read_as_it_lies_in_the_file(image: Image) -> None:
    for bucket in image.manifest.buckets:
        content = image.path(bucket.file).read_bytes()
        data = BucketReader().read_range(image, bucket.file, bucket.offset, bucket.size_bytes)
        assert data == content[bucket.offset : bucket.offset + bucket.size_bytes]
        assert data.readonly


def test_files_of_the_hugging_face_cache_are_read_through_their_links(tmp_path: Path) -> None:
    image = build_manifest(make_hf_cache(tmp_path))
    data = BucketReader().read_range(image, weights(image), 0, 100)
    assert data == (image.folder / "model.safetensors").read_bytes()[:100]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_never_served(image: Image, change: object) -> None:
    change(image.folder / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(FolderChanged) as caught:
        BucketReader().read_range(image, weights(image), 0, 8)
    assert caught.value.file == "model.safetensors"


def test_a_folder_in_whose_place_a_file_is_has_changed(image: Image) -> None:
    image.folder.rename(image.folder.with_name("away"))
    image.folder.write_text("a file")
    with pytest.raises(FolderChanged):
        BucketReader().read_range(image, weights(image), 0, 8)


def test_a_change_of_one_file_does_not_stop_the_others(image: Image) -> None:
    (image.folder / "config.json").write_text("changed")
    assert len(BucketReader().read_range(image, weights(image), 0, 8)) == 8


def test_a_file_that_changes_while_it_is_read_is_not_served(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reader_module._read_full

    def read_then_change(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        rewrite_in_place(image.folder / "model.safetensors")

    monkeypatch.setattr(reader_module, "_read_full", read_then_change)
    with pytest.raises(FolderChanged):
        BucketReader().read_range(image, weights(image), 0, 8)


@pytest.mark.parametrize(("file", "offset", "size"), [(99, 0, 1), (-1, 0, 1), (1, -1, 1), (1, 0, 0), (1, 10**9, 1)])
def test_a_range_that_is_not_there_is_the_callers_mistake(image: Image, file: int, offset: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"there is no file|bytes, not"):
        BucketReader().read_range(image, file, offset, size)


def test_nothing_stays_open(image: Image) -> None:
    before = len(os.listdir("/proc/self/fd"))
    views = [BucketReader().read_range(image, weights(image), 0, 100) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(views) == 20
