"""Folders of others that this node can read: published ones, and those that engines started from.

    unknown --hash--> known --a file changed--> withdrawn

A folder is never mapped, only read, and only while the stamps of its files are those of the hash.
The list is kept in the stage, so that an agent that restarts hashes them again and serves on.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from hotweights.transports.threads import in_thread
from hotweights.worker_client.agent.work import Work
from hotweights.worker_client.image.errors import FolderChanged, ImageError
from hotweights.worker_client.image.manifest import Image, build_manifest
from hotweights.worker_client.stage.threads import Figures, stoppable

log = logging.getLogger(__name__)

FOLDERS_MAX = 64

Key = tuple[Path, bool]


class Entry(TypedDict):
    """A line of served.json."""

    folder: str
    digest: str
    include_code: bool
    versions: list[tuple[str, str]]


@dataclass
class Known:
    """A folder whose bytes were hashed, and the versions it was published as ("" names none)."""

    image: Image
    include_code: bool
    versions: list[tuple[str, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.image.folder


class Folders:
    """Hashes folders once, remembers them, and forgets those that changed. Use from one event loop."""

    def __init__(self, record: Path, bucket_bytes: int | None, changed: Callable[[], None]) -> None:
        self._record = record
        self._bucket_bytes = bucket_bytes
        self._changed = changed
        self._known: dict[Key, Known] = {}  # least recently used first
        self._hashing: dict[Key, Work[Known]] = {}
        self._to_recall: list[Entry] = []
        self._recalled_one = asyncio.Event()

    def digests(self) -> list[bytes]:
        return list(dict.fromkeys(known.image.digest for known in self._known.values()))

    def all(self) -> list[Known]:
        return list(self._known.values())

    def hash(self, folder: Path, *, include_code: bool = False) -> Work[Known]:
        """The work that ends with the folder known. One work a folder, for whoever asks; it goes on without them."""
        key = (folder.resolve(), include_code)
        work = self._hashing.get(key)
        if work is None:
            figures = Figures()
            work = Work(self._learn(key, figures), figures, kept=True)
            self._hashing[key] = work
            work.task.add_done_callback(lambda _: self._hashing.pop(key, None))
        return work

    def find(self, digest: bytes) -> Known | None:
        """A folder with these bytes, unchanged as far as its stamps tell."""
        for key, known in list(self._known.items()):
            if known.image.digest != digest:
                continue
            try:
                known.image.check_unchanged()
            except FolderChanged as error:
                self._forget(key, str(error))
            else:
                return known
        return None

    def peek(self, digest: bytes) -> Known | None:
        """As `find`, without looking at the stamps. Thread-safe."""
        return next((known for known in list(self._known.values()) if known.image.digest == digest), None)

    def withdraw(self, digest: bytes, why: str) -> None:
        """Its bytes are not what they were."""
        for key, known in list(self._known.items()):
            if known.image.digest == digest:
                self._forget(key, why)

    def published_before(self, known: Known, model: str) -> Known | None:
        """The folder that was published last as a version of the model, other than this one."""
        of_model = (one for one in self._known.values() if any(of == model for of, _ in one.versions))
        return next((one for one in reversed(list(of_model)) if one is not known), None)

    def publish_as(self, known: Known, model: str, version: str) -> None:
        """From now on it is served as this version, over restarts."""
        if (model, version) not in known.versions:
            known.versions.append((model, version))
        self._save()

    async def recall(self) -> None:
        """Hashes what a former agent served, one after the other; what is not the same any more is dropped by name."""
        self._to_recall = self._load()
        while self._to_recall:
            entry = self._to_recall[0]
            await self._recall_one(entry)
            self._to_recall.remove(entry)
            self._save()
            self._recalled_one.set()
            self._recalled_one = asyncio.Event()

    async def recalled(self, digest: bytes) -> None:
        """Waits until the folder that a former agent served as this is hashed again, next of all, or dropped."""
        while entry := next((entry for entry in self._to_recall if entry["digest"] == digest.hex()), None):
            self._to_recall.remove(entry)
            self._to_recall.insert(min(1, len(self._to_recall)), entry)  # behind the one under way
            await self._recalled_one.wait()

    async def _recall_one(self, entry: Entry) -> None:
        folder = Path(entry["folder"])
        try:
            known = await asyncio.shield(self.hash(folder, include_code=entry["include_code"]).task)
        except (ImageError, OSError) as error:
            log.warning("no longer served: %s", error)
            return
        if known.image.digest.hex() != entry["digest"]:
            self.withdraw(known.image.digest, f"{folder} changed since it was published")
            return
        for model, version in entry["versions"]:
            self.publish_as(known, model, version)

    async def close(self) -> None:
        for work in list(self._hashing.values()):
            work.task.cancel()
            await asyncio.wait({work.task})

    async def _learn(self, key: Key, figures: Figures) -> Known:
        folder, include_code = key
        known = self._known.get(key)
        if known is not None and self.find(known.image.digest) is known:
            return known

        def build(stop: Callable[[], bool]) -> Image:
            return build_manifest(
                folder,
                bucket_bytes=self._bucket_bytes,
                include_code=include_code,
                progress=stoppable(figures.write, stop),
            )

        image = await in_thread(build)
        image.check_unchanged()
        known = Known(image, include_code)
        self._known[key] = known
        self._keep_few()
        self._save()
        self._changed()
        return known

    def _keep_few(self) -> None:
        """Folders that engines started from must not pile up; published ones stay."""
        unpublished = [key for key, known in self._known.items() if not known.versions]
        for key in unpublished[: max(0, len(unpublished) - FOLDERS_MAX)]:
            del self._known[key]

    def _forget(self, key: Key, why: str) -> None:
        log.warning("no longer served: %s", why)
        del self._known[key]
        self._save()
        self._changed()

    def _save(self) -> None:
        entries: list[Entry] = [
            {
                "folder": str(known.folder),
                "digest": known.image.digest.hex(),
                "include_code": known.include_code,
                "versions": known.versions,
            }
            for known in self._known.values()
        ]
        entries += self._to_recall
        fresh = self._record.with_suffix(".new")
        fresh.write_text(json.dumps(entries, indent=1))
        fresh.replace(self._record)

    def _load(self) -> list[Entry]:
        try:
            entries: list[Entry] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return []
        except json.JSONDecodeError as error:
            log.warning("%s cannot be read, so nothing published before is served: %s", self._record, error)
            return []
        return entries
