"""The stage's promises: whole, verified, read-only, within its room, and never what somebody still needs."""

import asyncio
import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.worker_client.stage.checkpoints import contents, make_image, make_image_with_draft, touch_bytes

from hotweights.v1 import manifest_pb2
from hotweights.worker_client.image.digests import digest_of
from hotweights.worker_client.image.errors import BadImage, FolderChanged
from hotweights.worker_client.image.manifest import Image
from hotweights.worker_client.stage import pins
from hotweights.worker_client.stage.allocating import Allocating
from hotweights.worker_client.stage.copy import copy_folder
from hotweights.worker_client.stage.errors import ImageAltered, NotStaged, StageFull, StageTaken, StageUnsafe
from hotweights.worker_client.stage.room import Room, small_pages
from hotweights.worker_client.stage.stage import Stage, safe_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stage"


@pytest.fixture
def stage(root: Path) -> Iterator[Stage]:
    stage = Stage(root)
    stage.open()
    yield stage
    stage.close()


def no_progress(bytes_done: int, bytes_total: int) -> None: ...


def put(stage: Stage, image: Image) -> Path:
    """Stages an image from its folder."""
    partial, resumed = stage.reserve(image.digest, image.blob)
    if resumed:
        partial.scan()
    copy_folder(partial, image, no_progress)
    return stage.finish(partial)


def test_a_staged_image_equals_its_folder_and_nobody_can_write_it(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    folder = put(stage, image)
    assert contents(folder) == contents(image.folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o440}
    assert stat.S_IMODE(stage.root.stat().st_mode) == 0o700
    assert stage.held() == [image.digest]


def test_a_draft_is_staged_in_its_folder_and_checked_like_the_rest(stage: Stage, tmp_path: Path) -> None:
    image = make_image_with_draft(tmp_path / "v1")
    folder = put(stage, image)
    assert contents(folder) == contents(image.folder)
    assert len([name for name in contents(folder) if name.startswith("draft/")]) == 3
    assert stage.used_bytes() >= image.size_bytes
    stage.close()
    again = Stage(stage.root)
    assert again.open() == [image.digest]
    assert again.verify(image.digest)  # what a former agent left whole is whole
    touch_bytes(folder / "draft" / "model-1.safetensors", 1000)
    with pytest.raises(ImageAltered, match=r"draft/model-1.safetensors"):
        again.map(image.digest, "replica")
    partial, resumed = again.reserve(image.digest, image.blob)
    assert resumed
    partial.scan()
    assert len(partial.missing) == 1  # the rest of it is good
    copy_folder(partial, image, no_progress)
    assert contents(again.finish(partial)) == contents(image.folder)
    again.close()


def test_an_image_that_is_not_complete_cannot_be_mapped(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)
    with pytest.raises(NotStaged):
        stage.map(image.digest, "replica")
    with pytest.raises(RuntimeError, match="buckets are missing"):
        stage.finish(partial)
    assert not (stage.root / image.digest.hex()).exists()


def test_a_bucket_has_room_once_all_its_pages_are_there(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 14)
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)
    buckets = range(len(image.manifest.buckets))
    assert not any(partial.has_room(index) for index in buckets)
    seen = set[int]()

    def look() -> None:
        with_room = [bucket for index, bucket in enumerate(image.manifest.buckets) if partial.has_room(index)]
        seen.add(len(with_room))
        for bucket in with_room:
            state = (partial.folder / image.manifest.files[bucket.file].name).stat()
            assert state.st_size == image.manifest.files[bucket.file].size_bytes
            assert state.st_blocks * 512 >= bucket.offset + bucket.size_bytes

    stage.allocate(partial, look, lambda: False)
    assert all(partial.has_room(index) for index in buckets)
    assert len(seen) > 2, "it came bit by bit"
    for file in image.manifest.files:
        assert (partial.folder / file.name).stat().st_blocks * 512 >= file.size_bytes


def test_pages_are_there_before_a_bucket_is_said_to_have_room(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 14)
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)
    real, with_room, calls = os.posix_fallocate, 0, 0

    def take(handle: int, offset: int, size: int) -> None:
        nonlocal with_room, calls
        calls += 1
        now = sum(map(partial.has_room, range(len(image.manifest.buckets))))
        real(handle, offset, size)
        assert sum(map(partial.has_room, range(len(image.manifest.buckets)))) == now
        with_room = now

    monkeypatch.setattr(os, "posix_fallocate", take)
    stage.allocate(partial, lambda: None, lambda: calls == 3)
    assert calls == 3, "it ends when told"
    stage.allocate(partial, lambda: None, lambda: False)
    assert 0 < with_room < len(image.manifest.buckets)


async def test_where_the_room_turned_out_to_be_too_small_nothing_more_is_begun(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 14)
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)
    real, calls = os.posix_fallocate, 0

    def runs_out(handle: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", runs_out)
    room = Allocating(stage, partial)
    with pytest.raises(StageFull):
        await asyncio.wait_for(room.all(), 10)
    assert partial.has_room(0)
    with pytest.raises(StageFull):
        await room.of(0)
    await room.close()


def test_what_is_taken_while_room_is_measured_counts_as_promised_all_the_same(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)

    def measure(*_: object, **__: object) -> Room:
        partial.allocate()  # its thread goes on meanwhile
        return Room(10_000_000, "stage")

    monkeypatch.setattr("hotweights.worker_client.stage.stage.measure_room", measure)
    assert stage.room().free_bytes <= 10_000_000 - image.size_bytes


def test_where_more_is_promised_than_there_is_no_image_goes_in_vain(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, one, two = (make_image(tmp_path / f"v{number}", seed=number) for number in range(3))
    put(stage, victim)
    free = one.size_bytes * 2
    monkeypatch.setattr(
        "hotweights.worker_client.stage.stage.measure_room", lambda *_, **__: Room(max(0, free), "stage")
    )
    stage.reserve(one.digest, one.blob)
    free = 0  # somebody else took it
    with pytest.raises(StageFull) as refused:
        stage.reserve(two.digest, two.blob)
    assert refused.value.free_bytes == 0
    assert stage.held() == [victim.digest]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_where_no_file_can_be_made_the_image_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "shm"
    mount.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=12", "tmpfs", str(mount)]
    if subprocess.run(small, check=False).returncode:
        pytest.skip("this container may not mount")
    stage = Stage(mount / "stage")
    try:
        image = make_image(tmp_path / "v1")
        stage.open()
        before = sorted(stage.root.rglob("*"))
        made = 0
        with suppress(OSError):
            for made in range(20):
                (mount / f"other-{made}").touch()
        for left in (0, 2):  # for the manifest, and for the folder too
            for number in range(left):
                (mount / f"other-{number}").unlink(missing_ok=True)
            with pytest.raises(StageFull):
                stage.reserve(image.digest, image.blob)
            assert sorted(stage.root.rglob("*")) == before
    finally:
        stage.close()
        subprocess.run(["umount", mount], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
@pytest.mark.parametrize(
    ("pages", "mount_mib", "tensor_bytes"), [("never", 2, 500_000), ("within_size", 16, 4_000_000)]
)
async def test_room_that_somebody_else_takes_while_an_image_comes_is_a_refusal_and_nobodys_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: str, mount_mib: int, tensor_bytes: int
) -> None:
    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 14)
    mount = tmp_path / "shm"
    mount.mkdir()
    options = f"size={mount_mib}m,huge={pages}"
    mounting = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", options, "tmpfs", mount)
    if await mounting.wait():
        pytest.skip("this container may not mount")
    stage = Stage(mount / "stage")
    try:
        image = make_image(tmp_path / "v1", tensor_bytes=tensor_bytes)
        stage.open()
        partial, _ = stage.reserve(image.digest, image.blob)
        (mount / "others").write_bytes(bytes((mount_mib << 20) - image.size_bytes // 2))
        room = Allocating(stage, partial)
        last = len(image.manifest.buckets) - 1
        with pytest.raises(StageFull) as refused:
            await asyncio.wait_for(room.of(last), 10)
        assert refused.value.needed_bytes > refused.value.free_bytes
        assert not partial.has_room(last)
        await room.close()
        stage.abandon(partial, gone=True)
        assert not list(stage.root.glob("*.partial"))
        (mount / "others").unlink()
        put(stage, image)
        assert stage.held() == [image.digest]
        assert small_pages(stage.root) == ("" if pages == "within_size" else str(mount))
    finally:
        stage.close()
        assert await (await asyncio.create_subprocess_exec("umount", mount)).wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are looked at on Linux")
def test_only_a_tmpfs_has_pages_that_could_be_larger() -> None:
    assert small_pages(Path("/proc/self")) == ""


def test_only_one_agent_uses_a_stage(stage: Stage) -> None:
    with pytest.raises(StageTaken):
        Stage(stage.root).open()


def test_a_stage_open_to_others_is_closed_to_them(root: Path) -> None:
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    stage = Stage(root)
    stage.open()
    stage.close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_link_in_the_place_of_the_stage_is_refused(tmp_path: Path, root: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StageUnsafe):
        Stage(root).open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_stage_of_another_user_is_refused(root: Path) -> None:
    root.mkdir(mode=0o700)
    os.chown(root, 65534, 65534)
    with pytest.raises(StageUnsafe):
        Stage(root).open()


def test_a_full_stage_refuses_with_figures_and_gives_up_nothing(root: Path, tmp_path: Path) -> None:
    small, large = make_image(tmp_path / "v1"), make_image(tmp_path / "v2", seed=2, tensor_bytes=1_000_000)
    stage = Stage(root, quota_bytes=1_000_000)
    stage.open()
    put(stage, small)
    with pytest.raises(StageFull) as refused:
        stage.reserve(large.digest, large.blob)
    assert refused.value.needed_bytes >= large.size_bytes
    assert refused.value.free_bytes < 1_000_000
    assert str(refused.value.needed_bytes) in str(refused.value)
    assert stage.held() == [small.digest], "what is held must not go for an image that does not fit anyway"
    assert not list(stage.root.glob("*.partial"))
    stage.close()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_small_shared_memory_refuses_with_a_hint_instead_of_killing_anybody(tmp_path: Path) -> None:
    mount = tmp_path / "shm"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        image = make_image(tmp_path / "v1", tensor_bytes=1_000_000)
        stage = Stage(mount / "stage")
        stage.open()
        with pytest.raises(StageFull, match=r"64 MiB") as refused:
            stage.reserve(image.digest, image.blob)
        assert refused.value.fields["limited_by"] == "stage"
        stage.close()
    finally:
        subprocess.run(["umount", mount], check=True)


def test_room_that_is_given_away_is_not_given_twice(root: Path, tmp_path: Path) -> None:
    one, two = make_image(tmp_path / "a"), make_image(tmp_path / "b", seed=2)
    stage = Stage(root, quota_bytes=int(one.size_bytes * 1.5))
    stage.open()
    stage.reserve(one.digest, one.blob)
    with pytest.raises(StageFull):
        stage.reserve(two.digest, two.blob)
    stage.close()


def test_the_oldest_image_nobody_needs_goes_when_the_next_one_comes(stage: Stage, tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"v{number}", seed=number) for number in range(4)]
    put(stage, images[0])
    put(stage, images[1])
    stage.set_pinned([images[0].digest])
    put(stage, images[2])
    assert stage.held() == [images[0].digest, images[2].digest]
    stage.map(images[2].digest, "replica")
    put(stage, images[3])
    assert set(stage.held()) == {images[0].digest, images[2].digest, images[3].digest}, "pinned ones stay beyond two"
    assert not (stage.root / f"{images[1].digest.hex()}.manifest").exists()


def test_a_release_lets_the_image_go_at_the_next_staging_and_not_before(stage: Stage, tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"v{number}", seed=number) for number in range(3)]
    for image in images[:2]:
        put(stage, image)
        stage.map(image.digest, "replica")
    assert stage.release(images[0].digest, "replica")
    assert not stage.release(images[0].digest, "replica"), "it was released"
    assert images[0].digest in stage.held()
    put(stage, images[2])
    assert stage.held() == [images[1].digest, images[2].digest]


@pytest.mark.parametrize("restarted", [False, True], ids=["fresh", "after a restart"])
def test_an_image_that_was_written_to_after_it_was_verified_is_not_mapped(
    stage: Stage, tmp_path: Path, restarted: bool
) -> None:
    image = make_image(tmp_path / "v1")
    folder = put(stage, image)
    if restarted:
        stage.close()
        (found,) = stage.open()
        assert stage.verify(found)
    file = next(folder.glob("*.safetensors"))
    before = file.stat()
    touch_bytes(file, 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the change time tells all the same
    assert not stage.is_whole(image.digest)
    with pytest.raises(NotStaged):
        stage.map(image.digest, "replica")
    assert stage.held() == []
    partial, resumed = stage.reserve(image.digest, image.blob)
    assert resumed
    partial.scan()
    assert len(partial.missing) == 1, "only what was altered is fetched again"
    copy_folder(partial, image, no_progress)
    assert contents(stage.finish(partial)) == contents(image.folder)


def test_whoever_maps_an_altered_image_is_told_which_file(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    file = next(put(stage, image).glob("*.safetensors"))
    assert stage.is_whole(image.digest)
    touch_bytes(file, 1000)
    with pytest.raises(ImageAltered, match=file.name):
        stage.map(image.digest, "replica")
    assert stage.held() == []


def test_the_pin_of_a_client_that_was_killed_goes_after_its_grace(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    put(stage, image)
    stage.map(image.digest, "replica/../1")
    pin = pins.pin_path(stage.root, image.digest, "replica/../1")
    code = (
        "import sys, time; from pathlib import Path; from hotweights.worker_client.stage.pins import hold_pin;"
        "hold_pin(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", code, str(pin)], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"held\n"
    long_ago = time.time() - 2 * pins.GRACE_S
    os.utime(pin, (long_ago, long_ago))
    assert stage.pins.clients(image.digest) == ["replica/../1"], "it lives and holds its lock"
    client.kill()
    client.wait(10)
    client.stdout.close()
    assert stage.pins.clients(image.digest) == []
    assert not pin.exists()


def test_pins_of_the_coordinator_outlive_the_agent(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    put(stage, image)
    stage.set_pinned([image.digest])
    stage.close()
    again = Stage(stage.root)
    assert again.open() == [image.digest]
    assert again.held() == [], "nothing is offered before it is verified"
    assert again.verify(image.digest)
    assert [held.pinned for held in again.images()] == [True]
    again.close()


def test_an_image_that_broke_while_no_agent_ran_is_not_offered_and_only_its_bad_bucket_comes_again(
    stage: Stage, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "v1")
    folder = put(stage, image)
    stage.close()
    touch_bytes(folder / "model-1.safetensors", 70_000)
    again = Stage(stage.root)
    (found,) = again.open()
    assert not again.verify(found)
    assert again.held() == []
    partial, resumed = again.reserve(image.digest, image.blob)
    assert resumed
    partial.scan()
    bad = [index for index, bucket in enumerate(image.manifest.buckets) if bucket.file == 2 and bucket.offset == 65536]
    assert sorted(partial.missing) == bad
    again.close()


def test_what_a_killed_agent_left_half_done_is_gone_over_and_kept(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    partial, resumed = stage.reserve(image.digest, image.blob)
    assert not resumed
    data = (image.folder / "model-0.safetensors").read_bytes()
    first = next(index for index, bucket in enumerate(image.manifest.buckets) if bucket.file == 1)
    with partial.view(first) as place:
        place[:] = data[: len(place)]
    stage.close()  # its files stay as a kill would leave them
    again = Stage(stage.root)
    assert again.open() == []
    resumed_partial, resumed = again.reserve(image.digest, image.blob)
    assert resumed
    resumed_partial.scan()
    assert resumed_partial.missing == set(range(len(image.manifest.buckets))) - {first}
    again.close()


def test_what_has_no_manifest_or_another_one_is_removed_at_the_start(stage: Stage, tmp_path: Path) -> None:
    one, two = make_image(tmp_path / "a"), make_image(tmp_path / "b", seed=2)
    folders = [put(stage, one), put(stage, two)]
    stage.close()
    (stage.root / f"{one.digest.hex()}.manifest").unlink()
    (stage.root / f"{two.digest.hex()}.manifest").chmod(0o600)
    (stage.root / f"{two.digest.hex()}.manifest").write_bytes(one.blob)
    again = Stage(stage.root)
    assert again.open() == []
    assert not any(folder.exists() for folder in folders)
    again.close()


def test_a_folder_that_changed_is_not_copied(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    touch_bytes(image.folder / "model-0.safetensors", 5000)
    partial, _ = stage.reserve(image.digest, image.blob)
    with pytest.raises(FolderChanged):
        copy_folder(partial, image, no_progress)


def test_a_folder_that_changed_behind_its_stamps_is_not_copied(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    path = image.folder / "model-0.safetensors"
    before = path.stat()
    touch_bytes(path, 5000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    partial, _ = stage.reserve(image.digest, image.blob)
    with pytest.raises(FolderChanged):
        copy_folder(partial, image, no_progress)
    stage.abandon(partial)
    assert stage.held() == []


@pytest.mark.parametrize("name", ["../escape.json", "/tmp/escape.json", "a/b.json", "..", ".hidden.json", "model.pkl"])
def test_a_manifest_with_a_name_that_leads_elsewhere_is_refused_before_anything_is_made(
    stage: Stage, tmp_path: Path, name: str
) -> None:
    image = make_image(tmp_path / "v1")
    manifest = manifest_pb2.Manifest.FromString(image.blob)
    manifest.files[0].name = name
    blob = manifest.SerializeToString(deterministic=True)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(BadImage):
        stage.reserve(digest_of(blob), blob)
    assert set(tmp_path.rglob("*")) == before


def test_a_link_planted_in_an_unfinished_image_is_not_followed(stage: Stage, tmp_path: Path) -> None:
    image = make_image(tmp_path / "v1")
    partial, _ = stage.reserve(image.digest, image.blob)
    stage.abandon(partial)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (partial.folder / "config.json").unlink()
    (partial.folder / "config.json").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        stage.reserve(image.digest, image.blob)
    assert victim.read_text() == "precious"


def test_folders_on_the_way_to_the_stage_are_nobody_elses_to_write_to(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    shared.chmod(0o1777)
    before = os.umask(0)
    try:
        safe_folder(shared / "on" / "the" / "way", in_pod=False)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((shared / name).stat().st_mode) for name in ("on", "on/the", "on/the/way")]
    assert modes == [0o755, 0o755, 0o700]


def test_a_stage_that_everybody_may_replace_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StageUnsafe, match="everybody may write to"):
        safe_folder(tmp_path / "a" / "b", in_pod=False)
    assert list(tmp_path.iterdir()) == []
    safe_folder(tmp_path / "a" / "b", in_pod=True)  # as the kubelet makes volumes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_stage_in_a_folder_that_another_user_made_for_all_is_refused(tmp_path: Path) -> None:
    """Who owns a sticky folder may rename what others have in it."""
    tmp_path.chmod(0o1777)
    theirs = tmp_path / "hotweights"
    theirs.mkdir()
    theirs.chmod(0o1777)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(StageUnsafe, match="belongs to user 65534"):
        safe_folder(theirs / "0", in_pod=False)
    assert list(theirs.iterdir()) == []
