"""Proving a folder: what is right is found right, and what is not is named."""

import shutil
from pathlib import Path

import pytest
from tests.worker_client.image.files import make_folder, make_hf_cache

from hotweights.worker_client.image import Image, build_manifest, verify_folder


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return build_manifest(make_folder(tmp_path / "model"), bucket_bytes=4096)


def test_the_folder_a_manifest_was_made_from_and_any_copy_of_it_are_right(image: Image, tmp_path: Path) -> None:
    shutil.copytree(image.folder, tmp_path / "copy")
    for folder in (image.folder, tmp_path / "copy", make_hf_cache(tmp_path / "cache")):
        verified = verify_folder(folder, image.manifest)
        assert verified.ok
        assert verified.good == frozenset(range(len(image.manifest.buckets)))


@pytest.mark.parametrize("index", [0, 3, -1])
def test_one_wrong_byte_is_found_in_its_bucket_and_in_no_other(image: Image, index: int) -> None:
    bad = image.manifest.buckets[index]
    path = image.path(bad.file)
    content = bytearray(path.read_bytes())
    content[bad.offset + bad.size_bytes - 1] ^= 1
    path.write_bytes(content)
    verified = verify_folder(image.folder, image.manifest)
    every = range(len(image.manifest.buckets))
    assert verified.good == frozenset(every) - {every[index]}
    (problem,) = verified.problems
    assert (problem.file, problem.offset, problem.size_bytes) == (path.name, bad.offset, bad.size_bytes)


def test_a_problem_names_the_tensors_it_touches(image: Image) -> None:
    path = image.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"????")
    (problem,) = verify_folder(image.folder, image.manifest).problems
    touched = [tensor for tensor in image.manifest.tensors if tensor.offset + tensor.size_bytes > problem.offset]
    assert problem.tensors == tuple(tensor.name for tensor in touched if tensor.size_bytes)
    assert "layer.0.bias" in problem.tensors
    assert "scalar" not in problem.tensors
    assert f"(in {problem.tensors[0]}" in str(problem)


def test_a_missing_file_and_a_link_out_of_the_folder_are_problems_of_their_files(image: Image, tmp_path: Path) -> None:
    (image.folder / "config.json").unlink()
    (image.folder / "merges.txt").rename(tmp_path / "merges.txt")
    (image.folder / "merges.txt").symlink_to(tmp_path / "merges.txt")
    verified = verify_folder(image.folder, image.manifest)
    assert [problem.file for problem in verified.problems] == ["config.json", "merges.txt"]
    assert "cannot be opened" in str(verified.problems[0])
    assert "link out of the folder" in str(verified.problems[1])
    assert len(verified.good) == len(image.manifest.buckets) - 2


def test_a_half_filled_folder_tells_which_buckets_need_not_be_fetched_again(image: Image) -> None:
    path = image.folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: 3 * 4096 + 100])
    verified = verify_folder(image.folder, image.manifest)
    weights = [n for n, bucket in enumerate(image.manifest.buckets) if image.manifest.files[bucket.file].weights]
    assert verified.good & set(weights) == set(weights[:3])
    assert not verified.ok
    # Allocated in full, as the stage does, and zeros from there on.
    path.write_bytes(whole[: 3 * 4096 + 100].ljust(len(whole), b"\0"))
    assert verify_folder(image.folder, image.manifest).good & set(weights) == set(weights[:3])


def test_a_file_that_is_longer_than_it_should_be_is_not_right(image: Image) -> None:
    with (image.folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    verified = verify_folder(image.folder, image.manifest)
    assert len(verified.good) == len(image.manifest.buckets)
    assert [problem.file for problem in verified.problems] == ["model.safetensors"]


def test_progress_reaches_all_bytes(image: Image) -> None:
    told: list[tuple[int, int]] = []
    verify_folder(image.folder, image.manifest, progress=lambda done, total: told.append((done, total)), threads=2)
    assert told[-1] == (image.size_bytes, image.size_bytes)
