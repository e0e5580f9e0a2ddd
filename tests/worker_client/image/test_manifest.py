"""From a folder to an Image, and every way in which the folder can be wrong or change meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from google.protobuf.internal import decoder
from tests.worker_client.image.files import (
    entry,
    make_folder,
    make_folder_with_draft,
    make_hf_cache,
    make_sharded_folder,
    write_raw,
)

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image import (
    BadImage,
    FolderChanged,
    bucket_cuts,
    build_manifest,
    hash_bucket,
    open_image,
    parse_manifest,
    read_stamp,
)
from hotweights.worker_client.image.folder import INDEX
from hotweights.worker_client.image.manifest import _bucket_bytes

BUCKET = 4096


def test_a_manifest_lists_files_tensors_and_buckets_in_order(tmp_path: Path) -> None:
    image = build_manifest(make_folder(tmp_path / "model"), bucket_bytes=BUCKET)
    manifest = image.manifest
    assert manifest.format == "safetensors"
    assert [(part.name, part.role) for part in manifest.components] == [("target", manifest_pb2.COMPONENT_ROLE_TARGET)]
    sizes = {path.name: path.stat().st_size for path in image.folder.iterdir()}
    assert {file.name: file.size_bytes for file in manifest.files} == sizes
    assert [file.name for file in manifest.files] == sorted(sizes)
    assert [file.name for file in manifest.files if file.weights] == ["model.safetensors"]
    assert {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in manifest.tensors} == {
        "embed.weight": ("F32", [300, 40]),
        "empty": ("F16", [3, 0]),
        "layer.0.bias": ("U8", [3]),
        "layer.0.weight": ("F16", [40, 40]),
        "scalar": ("F32", []),
    }
    covered = [0] * len(manifest.files)
    for bucket in manifest.buckets:
        assert bucket.offset == covered[bucket.file]
        covered[bucket.file] += bucket.size_bytes
    assert covered == [file.size_bytes for file in manifest.files]
    assert image.size_bytes == sum(sizes.values())


def test_every_bucket_has_the_digest_that_its_bytes_give_on_arrival(tmp_path: Path) -> None:
    image = build_manifest(make_folder(tmp_path / "model"), bucket_bytes=BUCKET)
    cuts = bucket_cuts(image.manifest)
    assert len(cuts) == len(image.manifest.buckets) > 5
    for bucket, inside in zip(image.manifest.buckets, cuts, strict=True):
        content = image.path(bucket.file).read_bytes()[bucket.offset : bucket.offset + bucket.size_bytes]
        assert hash_bucket(memoryview(content), inside) == bucket.digest


def test_a_tensor_keeps_its_digest_across_versions_exactly_when_its_bytes_and_place_are_the_same(
    tmp_path: Path,
) -> None:
    first = make_folder(tmp_path / "v1")
    shutil.copytree(first, tmp_path / "v2")
    changed = tmp_path / "v2" / "model.safetensors"
    before = build_manifest(first, bucket_bytes=BUCKET).manifest
    target = next(tensor for tensor in before.tensors if tensor.name == "layer.0.weight")
    content = bytearray(changed.read_bytes())
    content[target.offset + 5] ^= 1
    changed.write_bytes(content)
    after = build_manifest(tmp_path / "v2", bucket_bytes=BUCKET).manifest
    differ = [a.name for a, b in zip(before.tensors, after.tensors, strict=True) if a.digest != b.digest]
    assert differ == ["layer.0.weight"]


def test_the_digest_names_the_content_wherever_the_folder_and_whatever_the_threads(tmp_path: Path) -> None:
    first = build_manifest(make_folder(tmp_path / "a" / "model"), bucket_bytes=BUCKET, threads=1)
    second = build_manifest(make_folder(tmp_path / "b"), bucket_bytes=BUCKET, threads=4)
    other = build_manifest(make_folder(tmp_path / "c", seed=1), bucket_bytes=BUCKET)
    assert first.blob == second.blob
    assert first.digest == second.digest == blake3(first.blob).digest()
    assert other.digest != first.digest


def test_the_blob_has_its_fields_in_number_order(tmp_path: Path) -> None:
    blob = build_manifest(make_folder(tmp_path / "model"), bucket_bytes=BUCKET).blob
    numbers, at = [], 0
    while at < len(blob):
        tag, at = decoder._DecodeVarint(blob, at)  # type: ignore[attr-defined]
        length, at = decoder._DecodeVarint(blob, at)  # type: ignore[attr-defined]
        numbers.append(tag >> 3)
        at += length if tag & 7 == 2 else 0
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 3, 4, 5, 6}


def test_progress_rises_to_all_bytes_and_what_it_raises_ends_the_hashing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    told: list[tuple[int, int]] = []
    image = build_manifest(folder, bucket_bytes=BUCKET, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (image.size_bytes, image.size_bytes)
    assert len(told) == len(image.manifest.buckets)

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        build_manifest(folder, bucket_bytes=BUCKET, progress=stop)


def test_a_snapshot_of_the_hugging_face_cache_is_an_image_like_the_plain_folder(tmp_path: Path) -> None:
    linked = build_manifest(make_hf_cache(tmp_path / "cache"), bucket_bytes=BUCKET)
    plain = build_manifest(make_folder(tmp_path / "plain"), bucket_bytes=BUCKET)
    assert linked.digest == plain.digest
    linked.check_unchanged()


def test_shards_named_by_an_index_make_one_image(tmp_path: Path) -> None:
    manifest = build_manifest(make_sharded_folder(tmp_path / "model")).manifest
    assert [(tensor.name, manifest.files[tensor.file].name[:11]) for tensor in manifest.tensors] == [
        ("a", "model-00001"),
        ("b", "model-00001"),
        ("c", "model-00002"),
    ]


def test_a_draft_is_a_component_whose_tensors_may_have_the_targets_names(tmp_path: Path) -> None:
    image = build_manifest(make_folder_with_draft(tmp_path / "model"), bucket_bytes=BUCKET)
    manifest = image.manifest
    assert [(part.name, part.role) for part in manifest.components] == [
        ("target", manifest_pb2.COMPONENT_ROLE_TARGET),
        ("draft", manifest_pb2.COMPONENT_ROLE_DRAFT),
    ]
    of_parts = [sorted(tensor.name for tensor in manifest.tensors if tensor.component == part) for part in (0, 1)]
    assert of_parts[0] == of_parts[1]
    assert len(of_parts[0]) == 5
    assert {manifest.files[tensor.file].name for tensor in manifest.tensors if tensor.component} == {
        "draft/model.safetensors"
    }
    assert parse_manifest(image.blob) == manifest
    assert image.size_bytes == sum(path.stat().st_size for path in image.folder.rglob("*.*"))
    image.check_unchanged()
    (image.folder / "draft" / "config.json").write_text("{}")
    with pytest.raises(FolderChanged, match=r"draft/config.json"):
        image.check_unchanged()


def test_a_drafts_index_is_held_to_its_word(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    make_sharded_folder(folder / "draft")
    index = json.loads((folder / "draft" / INDEX).read_text())
    index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    (folder / "draft" / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadImage, match=r"draft/model.safetensors.index.json says it is here, but it is not"):
        build_manifest(folder)


def test_code_is_hashed_and_passed_on_only_by_those_who_ask_for_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "modeling.py").write_text("x = 1")
    without = build_manifest(folder)
    image = build_manifest(folder, include_code=True)
    assert without.digest != image.digest
    with pytest.raises(BadImage, match=r"modeling.py: is code"):
        parse_manifest(image.blob)
    assert parse_manifest(image.blob, allow_code=True) == image.manifest
    assert open_image(folder, image.blob, allow_code=True).digest == image.digest


def spoil_index(folder: Path, tensor: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_a_tensor_which_is_not_in_its_file_is_refused(tmp_path: Path) -> None:
    for number, (tensor, file) in enumerate(
        [("d", "model-00001-of-00002.safetensors"), ("a", "model-00002-of-00002.safetensors")]
    ):
        folder = make_sharded_folder(tmp_path / str(number))
        spoil_index(folder, tensor, file)
        with pytest.raises(BadImage, match="says it is here") as caught:
            build_manifest(folder)
        assert (caught.value.file, caught.value.tensor) == (file, tensor)


def test_a_tensor_in_two_files_is_refused_by_both_names(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    with pytest.raises(BadImage, match=r"model.safetensors: tensor 'embed.weight': is in copy.safetensors too"):
        build_manifest(folder)


def test_files_without_any_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_raw(tmp_path / "model" / "model.safetensors", {"__metadata__": {"format": "pt"}})
    with pytest.raises(BadImage, match="no tensor at all"):
        build_manifest(tmp_path / "model")


def test_a_bad_file_of_the_cache_is_named_as_the_model_names_it(tmp_path: Path) -> None:
    snapshot = make_hf_cache(tmp_path)
    write_raw((snapshot / "model.safetensors").resolve(), {"a": entry("F32", [1], 0, 4)}, b"123")
    with pytest.raises(BadImage, match=r"^model.safetensors: tensor 'a': truncated"):
        build_manifest(snapshot)


@pytest.mark.parametrize(
    ("image_bytes", "bucket_bytes"),
    [(0, 512 << 10), (256 << 20, 512 << 10), ((256 << 20) + 1, 1 << 20), (2 << 30, 4 << 20), (1 << 40, 16 << 20)],
)
def test_buckets_are_about_a_five_hundredth_of_the_image(
    image_bytes: int, bucket_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _bucket_bytes(image_bytes) == bucket_bytes
    folder = make_folder(tmp_path / "model")
    assert build_manifest(folder).manifest.bucket_bytes == 512 << 10
    monkeypatch.setattr("hotweights.worker_client.image.manifest.SMALLEST_BUCKET_BYTES", 1024)
    assert build_manifest(folder).manifest.bucket_bytes == 1024


@pytest.mark.parametrize("bucket_bytes", [0, 1023, (1 << 30) + 1])
def test_impossible_bucket_sizes_are_refused(tmp_path: Path, bucket_bytes: int) -> None:
    with pytest.raises(BadImage, match="are possible"):
        build_manifest(make_folder(tmp_path / "model"), bucket_bytes=bucket_bytes)


def rewrite_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    # A file system with coarse times could give the old one again.
    os.utime(path, ns=(0, read_stamp(path).mtime_ns + 1))


def replace(path: Path) -> None:
    fresh = path.with_name("fresh")
    shutil.copy2(path, fresh)  # the same size and time: only the inode tells
    fresh.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link_away(path: Path) -> None:
    elsewhere = path.parent.parent / path.name
    path.rename(elsewhere)  # the same inode: only the link tells
    path.symlink_to(elsewhere)


CHANGES = [rewrite_in_place, replace, truncate, Path.unlink, link_away]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_changed_after_it_was_hashed_is_told_by_file(
    tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    image = build_manifest(make_folder(tmp_path / "model"), bucket_bytes=BUCKET)
    image.check_unchanged()
    change(image.folder / name)
    with pytest.raises(FolderChanged) as caught:
        image.check_unchanged()
    assert (caught.value.folder, caught.value.file) == (image.folder, name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["at the first bucket", "at the last"])
def test_a_folder_that_changes_while_it_is_hashed_gives_no_image(
    tmp_path: Path, change: Callable[[Path], None], moment: str
) -> None:
    folder = make_folder(tmp_path / "model")
    changed = False

    def progress(done: int, total: int) -> None:
        nonlocal changed
        if not changed and (moment == "at the first bucket" or done == total):
            changed = True
            change(folder / "model.safetensors")

    with pytest.raises(FolderChanged) as caught:
        build_manifest(folder, bucket_bytes=BUCKET, progress=progress)
    assert caught.value.file == "model.safetensors"


def test_a_staged_folder_is_opened_by_its_manifest_without_hashing(tmp_path: Path) -> None:
    image = build_manifest(make_folder(tmp_path / "model"), bucket_bytes=BUCKET)
    again = open_image(image.folder, image.blob)
    assert again == image
    (image.folder / "config.json").write_text("longer than it was before")
    with pytest.raises(FolderChanged, match=r"config.json"):
        open_image(image.folder, image.blob)
    (image.folder / "config.json").unlink()
    with pytest.raises(FolderChanged, match=r"config.json"):
        open_image(image.folder, image.blob)


@pytest.mark.parametrize("blob", [b"\xff\xff\xff", b"", b"\x0a\x03abc"])
def test_bytes_that_are_no_manifest_are_refused(blob: bytes) -> None:
    with pytest.raises(BadImage, match="manifest"):
        parse_manifest(blob)


def test_importing_images_loads_neither_grpc_nor_torch() -> None:
    code = "import sys, hotweights.worker_client.image; print([m for m in ('grpc', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
