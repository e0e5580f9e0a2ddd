"""What the default store survives: kills, full disks, a second coordinator, and files it cannot read."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights.coordinator.store import Batch, StoreBroken, StoreInUse, WriteRefused
from hotweights.coordinator.store.base import StoreError
from hotweights.coordinator.store.sqlite import ANSWER_KEPT_S, SqliteStore

WRITER = Path(__file__).with_name("writer.py")
KILLS = 10


async def test_a_restart_keeps_all_that_was_acknowledged(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db", 100)
    await store.open()
    await store.write(Batch({"model a": b"1"}, set(), [(1, b"e")], {"k": (9e9, b"a")}, {"aa": b"m"}))
    await store.close()
    again = SqliteStore(tmp_path / "s.db", 100)
    opened = await again.open()
    assert (opened.records, opened.last_revision) == ({"model a": b"1"}, 1)
    assert await again.events_from(1, 9) == [(1, b"e")]
    assert await again.answer("k", 0.0) == b"a"
    assert await again.manifest("aa") == b"m"
    await again.close()


@pytest.mark.timeout(120)
async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "s.db", 0
    dice = random.Random(9)
    for _ in range(KILLS):
        acknowledged = await asyncio.to_thread(killed_after, path, acknowledged + 1, dice.uniform(0.0, 0.1))
        store = SqliteStore(path, 100_000)
        opened = await store.open()
        # At most one batch was durable and not yet acknowledged.
        last = opened.last_revision
        assert acknowledged <= last <= acknowledged + 1
        assert opened.records["model last"] == str(last).encode()
        kept = sorted(key for key in opened.records if key.startswith("version"))
        assert kept == sorted(f"version {i}" for i in range(max(1, last - 2), last + 1))
        assert [at for at, _ in await store.events_from(1, 100_000)] == list(range(1, last + 1))
        for revision in (1, acknowledged):
            text = str(revision).encode()
            assert await store.manifest(f"{revision:064x}") == text * 50
            assert await store.answer(f"request {revision}", 0.0) == text
        await store.close()
        acknowledged = last


def killed_after(path: Path, first: int, seconds: float) -> int:
    """The last revision that a writer acknowledged before it was killed."""
    writer = subprocess.Popen(
        [sys.executable, str(WRITER), str(path), str(first)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert writer.stdout is not None
    with writer, writer.stdout:
        lines = [writer.stdout.readline()]
        timer = subprocess.Popen(["sleep", str(seconds)])
        timer.wait()
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.readlines()
    whole = [line for line in lines if line.endswith(b"\n")]
    assert whole, "the writer wrote nothing"
    return int(whole[-1])


async def test_a_second_opener_is_kept_out(tmp_path: Path) -> None:
    first, second = SqliteStore(tmp_path / "s.db", 9), SqliteStore(tmp_path / "s.db", 9)
    await first.open()
    with pytest.raises(StoreInUse, match="in use by another coordinator"):
        await second.open()
    await first.write(Batch(puts={"model a": b"1"}))
    await first.close()
    opened = await second.open()
    # The attempt was no leader.
    assert (opened.epoch, opened.records) == (2, {"model a": b"1"})
    await second.close()


async def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(path, 9)
    await store.open()
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, str(WRITER), str(path), "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "StoreInUse" in done.stderr
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, which fills up."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting takes root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_refuses_cleanly_and_later_writes_go_through(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "s.db", 100)
    await store.open()
    await store.write(Batch(puts={"model a": b"before"}, events=[(1, b"e")]))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(2 << 20))
    with pytest.raises(WriteRefused, match="full"):
        await store.write(Batch(puts={"model a": b"after"}, events=[(2, b"e")], manifests={"aa": b"m" * 100_000}))
    assert await store.events_from(1, 9) == [(1, b"e")]
    ballast.unlink()
    await store.write(Batch(puts={"model a": b"later"}, events=[(2, b"e")]))
    await store.close()
    again = SqliteStore(small_disk / "s.db", 100)
    assert (await again.open()).records == {"model a": b"later"}
    await again.close()


async def test_a_full_database_refuses_cleanly_and_later_writes_go_through(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db", 100)
    await store.open()
    await store.write(Batch(puts={"model a": b"before"}))
    await store._call(lambda db: db.execute("PRAGMA max_page_count=20").fetchone())
    with pytest.raises(WriteRefused, match="full"):
        await store.write(Batch(puts={"model a": b"after"}, manifests={"aa": b"m" * 1_000_000}))
    await store.write(Batch(puts={"model b": b"small"}))
    await store.close()
    again = SqliteStore(tmp_path / "s.db", 100)
    assert (await again.open()).records == {"model a": b"before", "model b": b"small"}
    await again.close()


async def test_a_write_of_unknown_outcome_is_no_refusal(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db", 100)
    await store.open()
    await store._call(lambda db: db.execute("DROP TABLE events"))
    with pytest.raises(StoreBroken, match=r"s\.db.*no such table"):
        await store.write(Batch(events=[(1, b"e")]))
    with pytest.raises(StoreBroken, match=r"s\.db.*no such table"):
        await store.events_from(1, 1)
    await store.close()


@pytest.mark.parametrize("damage", ["all", "middle"])
async def test_a_corrupted_file_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(path, 100)
    await store.open()
    await store.write(Batch(puts={f"model {i}": b"x" * 2000 for i in range(100)}))
    await store.close()
    data = bytearray(path.read_bytes())
    start = 0 if damage == "all" else 4096
    data[start:] = bytes(random.Random(1).randbytes(len(data) - start))
    path.write_bytes(data)
    with pytest.raises(StoreBroken, match=str(path)) as caught:
        await SqliteStore(path, 100).open()
    assert isinstance(caught.value.__cause__, sqlite3.Error)


async def test_a_schema_from_the_future_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(path, 100)
    await store.open()
    await store._call(lambda db: db.execute("PRAGMA user_version=99"))
    await store.close()
    with pytest.raises(StoreBroken, match="has schema 99; this coordinator reads 1"):
        await SqliteStore(path, 100).open()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)
        assert db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone() == ("1",)
    db.close()


@pytest.mark.parametrize("where", ["folder", "under a file"])
async def test_a_place_that_cannot_hold_a_store_is_one_clear_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path if where == "folder" else tmp_path / "file" / "s.db"
    with pytest.raises(StoreError, match=str(path)):
        await SqliteStore(path, 100).open()


async def test_answers_are_forgotten_a_day_after_they_were_given(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db", 100)
    await store.open()
    now = 1_000_000.0
    await store.write(Batch(answers={"old": (now + ANSWER_KEPT_S, b"1")}))
    await store.write(Batch(answers={"new": (now + 1 + 2 * ANSWER_KEPT_S, b"2")}))
    count = await store._call(lambda db: db.execute("SELECT count(*) FROM answers").fetchone()[0])
    assert count == 1
    assert await store.answer("new", now) == b"2"
    await store.close()


async def test_the_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state" / "s.db", 100)
    await store.open()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    await store.close()
