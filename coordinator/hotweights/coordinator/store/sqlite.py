"""The default store: one SQLite file, one connection, one thread.

WAL with `synchronous=FULL`: NORMAL can lose acknowledged commits on power loss. Exactly one
connection: SQLite up to 3.51.2 has a WAL-reset corruption with two or more, and an exclusive lock
keeps a second coordinator out.
"""

import asyncio
import sqlite3
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from hotweights.coordinator.store.base import (
    Batch,
    Compacted,
    Opened,
    StoreBroken,
    StoreInUse,
    WriteRefused,
)

R = TypeVar("R")

# An answer is kept this long after its request.
ANSWER_KEPT_S = 86_400.0
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events (revision INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE answers (key TEXT PRIMARY KEY, expires_at REAL NOT NULL, payload BLOB NOT NULL);
CREATE TABLE manifests (digest TEXT PRIMARY KEY, blob BLOB NOT NULL);
"""
_CLEANLY_REFUSED = ("database or disk is full", "attempt to write a readonly database")


class SqliteStore:
    """All calls go to one thread, in order."""

    def __init__(self, path: Path, events_max: int) -> None:
        self._path = path
        self._events_max = events_max
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hotweights-store")
        self._connection: sqlite3.Connection | None = None
        self.name = f"sqlite:{path}"

    async def _call(self, work: Callable[[sqlite3.Connection], R]) -> R:
        def run() -> R:
            assert self._connection is not None, "the store is not open"
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                raise StoreBroken(f"{self._path}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def open(self) -> Opened:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    def _open(self) -> Opened:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            db = sqlite3.connect(self._path, timeout=1.0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreBroken(f"cannot open {self._path}: {error}") from error
        self._connection = db
        try:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("BEGIN EXCLUSIVE")
            self._prepare(db)
            opened = self._take_over(db)
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            db.close()
            if "locked" in str(error):
                raise StoreInUse(f"{self._path} is in use by another coordinator") from error
            raise StoreBroken(f"cannot use {self._path}: {error}") from error
        except sqlite3.Error as error:
            db.close()
            raise StoreBroken(f"cannot use {self._path}: {error}") from error
        return opened

    def _prepare(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("INSERT INTO meta VALUES ('cluster_id', ?)", (str(uuid.uuid4()),))
            db.execute("INSERT INTO meta VALUES ('epoch', '0')")
            db.execute("INSERT INTO meta VALUES ('revision', '0')")
        elif version != SCHEMA_VERSION:
            db.close()
            raise StoreBroken(f"{self._path} has schema {version}; this coordinator reads {SCHEMA_VERSION}")

    def _take_over(self, db: sqlite3.Connection) -> Opened:
        db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'epoch'")
        meta = dict(db.execute("SELECT key, value FROM meta"))
        records = {key: bytes(value) for key, value in db.execute("SELECT key, value FROM records")}
        return Opened(meta["cluster_id"], int(meta["epoch"]), records, int(meta["revision"]))

    async def write(self, batch: Batch) -> None:
        await self._call(lambda db: self._write(db, batch))

    def _write(self, db: sqlite3.Connection, batch: Batch) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            self._fill(db, batch)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if any(text in str(error) for text in _CLEANLY_REFUSED):
                raise WriteRefused(f"{self._path}: {error}") from error
            raise

    def _fill(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", batch.puts.items())
        db.executemany("DELETE FROM records WHERE key = ?", [(k,) for k in batch.deletes])
        db.executemany("INSERT OR REPLACE INTO manifests VALUES (?, ?)", batch.manifests.items())
        gone = [(digest,) for digest in batch.manifest_deletes]
        db.executemany("DELETE FROM manifests WHERE digest = ?", gone)
        db.executemany(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)",
            [(key, until, payload) for key, (until, payload) in batch.answers.items()],
        )
        if batch.events:
            last = batch.events[-1][0]
            db.executemany("INSERT INTO events VALUES (?, ?)", batch.events)
            db.execute("DELETE FROM events WHERE revision <= ?", (last - self._events_max,))
            db.execute("UPDATE meta SET value = ? WHERE key = 'revision'", (str(last),))
        if batch.answers:
            # Requests come one day after the other; the oldest are looked at with each new one.
            newest = max(until for until, _ in batch.answers.values())
            db.execute("DELETE FROM answers WHERE expires_at < ?", (newest - ANSWER_KEPT_S,))

    async def events_from(self, revision: int, limit: int) -> list[tuple[int, bytes]]:
        def read(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            (first,) = db.execute("SELECT min(revision) FROM events").fetchone()
            (last,) = db.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()
            if revision < (first if first is not None else int(last) + 1):
                raise Compacted(first if first is not None else int(last) + 1)
            rows = db.execute(
                "SELECT revision, payload FROM events WHERE revision >= ? ORDER BY 1 LIMIT ?",
                (revision, limit),
            )
            return [(at, bytes(payload)) for at, payload in rows]

        return await self._call(read)

    async def manifest(self, digest: str) -> bytes | None:
        def read(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT blob FROM manifests WHERE digest = ?", (digest,)).fetchone()
            return bytes(row[0]) if row else None

        return await self._call(read)

    async def answer(self, key: str, now: float) -> bytes | None:
        def read(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT payload FROM answers WHERE key = ? AND expires_at > ?", (key, now)).fetchone()
            return bytes(row[0]) if row else None

        return await self._call(read)

    async def close(self) -> None:
        def close() -> None:
            assert self._connection is not None
            self._connection.close()
            self._connection = None

        if self._connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=True)
