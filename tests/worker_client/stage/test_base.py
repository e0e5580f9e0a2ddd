"""What an image takes from the version before it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.worker_client.stage.checkpoints import BUCKET_BYTES, contents, make_folder, make_image, touch_bytes

from hotweights.worker_client.image.delta import make_delta
from hotweights.worker_client.image.manifest import Image, build_manifest
from hotweights.worker_client.image.reader import BucketReader
from hotweights.worker_client.stage.copy import copy_folder
from hotweights.worker_client.stage.partial import Partial
from hotweights.worker_client.stage.stage import Stage


def no_progress(bytes_done: int, bytes_total: int) -> None: ...


def next_version(folder: Path, before: Image, *changes: tuple[int, int]) -> Image:
    """The same with a byte changed here and there: by file and offset from its end."""
    folder.mkdir()
    for name, data in contents(before.folder).items():
        (folder / name).write_bytes(data)
    for file, from_end in changes:
        path = folder / before.manifest.files[file].name
        touch_bytes(path, path.stat().st_size - from_end)
    return build_manifest(folder, bucket_bytes=BUCKET_BYTES)


def stage_whole(stage: Stage, image: Image) -> None:
    partial, _ = stage.reserve(image.digest, image.blob)
    copy_folder(partial, image, no_progress)
    stage.finish(partial)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path / "stage", max_images=4)
    stage.open()
    return stage


def coming(stage: Stage, image: Image) -> Partial:
    return stage.reserve(image.digest, image.blob)[0]


def test_buckets_that_are_the_same_are_copied_and_the_rest_is_left(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    two = next_version(tmp_path / "v2", one, (1, 1))
    stage_whole(stage, one)
    partial = coming(stage, two)
    (base,) = stage.base_of(two.manifest)
    told: list[int] = []
    base.copy_unchanged(partial, lambda done, total: told.append(done))
    changed = [at for at, bucket in enumerate(two.manifest.buckets) if bucket not in one.manifest.buckets]
    assert len(changed) == 1
    assert partial.missing == set(changed)
    assert max(told) == partial.bytes_done == partial.bytes_total - two.manifest.buckets[changed[0]].size_bytes
    copy_folder(partial, two, no_progress)
    assert contents(stage.finish(partial)) == contents(two.folder)


def test_a_base_that_was_altered_gives_nothing_wrong(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    two = next_version(tmp_path / "v2", one, (1, 1))
    stage_whole(stage, one)
    touch_bytes(stage.root / one.digest.hex() / one.manifest.files[2].name, 4000)
    partial, (base,) = coming(stage, two), stage.base_of(two.manifest)
    base.copy_unchanged(partial, no_progress)
    assert {partial.manifest.buckets[at].file for at in partial.missing} == {1, 2}


def test_of_several_the_most_alike_is_the_base_and_of_equals_the_one_used_last(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    near = next_version(tmp_path / "near", one, (1, 1))
    far = next_version(tmp_path / "far", one, (1, 1), (2, 1), (2, 90_000))
    target = next_version(tmp_path / "target", one, (1, 1), (1, 2))
    for image in (near, far, one):
        stage_whole(stage, image)
    (base,) = stage.base_of(target.manifest)
    assert base.digest == one.digest  # as alike as `near`, and came later
    stage.map(near.digest, "somebody")
    (base,) = stage.base_of(target.manifest)
    assert base.digest == near.digest


def test_without_a_place_in_common_there_is_no_base(stage: Stage, tmp_path: Path) -> None:
    stage_whole(stage, make_image(tmp_path / "v1"))
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"w": np.ones(7, dtype=np.uint8)}, folder / "model.safetensors")
    assert stage.base_of(build_manifest(folder, bucket_bytes=BUCKET_BYTES).manifest) == []
    assert Stage(tmp_path / "empty").base_of(make_image(tmp_path / "v2", seed=2).manifest) == []


def test_a_base_whose_file_is_gone_is_none(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    stage_whole(stage, one)
    (stage.root / one.digest.hex() / one.manifest.files[0].name).unlink()
    assert stage.base_of(next_version(tmp_path / "v2", one, (1, 1)).manifest) == []


def test_a_layout_that_differs_in_part_has_the_other_places_in_common(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    stage_whole(stage, one)
    longer = make_folder(tmp_path / "v2")
    (longer / "config.json").write_text('{"model_type": "toy", "longer": true}')
    two = build_manifest(longer, bucket_bytes=BUCKET_BYTES)
    partial, (base,) = coming(stage, two), stage.base_of(two.manifest)
    base.copy_unchanged(partial, no_progress)
    assert [two.manifest.files[two.manifest.buckets[at].file].name for at in partial.missing] == ["config.json"]


def test_a_base_stays_while_it_is_used(stage: Stage, tmp_path: Path) -> None:
    one = make_image(tmp_path / "v1")
    stage_whole(stage, one)
    stage._max_images = 1
    (base,) = stage.base_of(one.manifest)
    stage_whole(stage, make_image(tmp_path / "v2", seed=2))
    assert one.digest in stage.held()
    base.close()
    stage_whole(stage, make_image(tmp_path / "v3", seed=3))
    assert one.digest not in stage.held()


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_rebuilt_is_written_only_if_it_is_right(stage: Stage, tmp_path: Path, fits: bool) -> None:
    one = make_image(tmp_path / "v1")
    two = next_version(tmp_path / "v2", one, (1, 1))
    stage_whole(stage, one)
    partial, (base,) = coming(stage, two), stage.base_of(two.manifest)
    changed = next(at for at, bucket in enumerate(two.manifest.buckets) if bucket not in one.manifest.buckets)
    before = contents(partial.folder)
    bucket = two.manifest.buckets[changed]
    target, old = (
        BucketReader().read_range(image, bucket.file, bucket.offset, bucket.size_bytes) for image in (two, one)
    )
    delta = make_delta(target, old)
    assert delta is not None
    assert base.rebuild(partial, changed, delta if fits else None) is fits
    assert (contents(partial.folder) != before) is fits
    assert partial.matches(changed) is fits
