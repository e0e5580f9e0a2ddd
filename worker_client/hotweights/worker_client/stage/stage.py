"""The stage: a folder of whole, verified images, and the rules by which they come and go.

    <stage>/<digest>/            a safetensors folder: complete, verified, files 0440
    <stage>/<digest>.partial/    one that is being filled, or was when its agent ended
    <stage>/<digest>.manifest    its manifest, kept beside
    <stage>/pins/, pinned.json   who needs which image: clients, and the coordinator

Room is promised under one lock for all models, before the first byte moves, and taken ahead of what
fills it: where others took the memory meanwhile the image is refused, and what it had is freed. What is not pinned goes
only when the next staging starts and needs its place. All methods block; call them in a thread.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hotweights.v1 import manifest_pb2
from hotweights.wire import failpoints
from hotweights.worker_client.image.digests import digest_of
from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.folder import inside
from hotweights.worker_client.image.manifest import parse_manifest
from hotweights.worker_client.image.verify import verify_folder
from hotweights.worker_client.stage.base import Base, likeness
from hotweights.worker_client.stage.errors import ImageAltered, NotStaged, StageFull, StageTaken, StageUnsafe
from hotweights.worker_client.stage.partial import Partial, Progress, image_bytes
from hotweights.worker_client.stage.pins import Pins
from hotweights.worker_client.stage.room import Room, measure_room
from hotweights.worker_client.stage.stamps import Stamps, stamps_of
from hotweights.worker_client.stage.way import weak_point

log = logging.getLogger(__name__)

_PARTIAL = ".partial"
_MANIFEST = ".manifest"
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


@dataclass(frozen=True)
class Held:
    """One image of the stage."""

    digest: bytes
    size_bytes: int
    client_ids: tuple[str, ...]
    pinned: bool


class Stage:
    """Owns the stage's folder from `open` to `close`."""

    def __init__(self, root: Path, *, max_images: int = 2, quota_bytes: int | None = None) -> None:
        self.root = root
        self.pins = Pins(root)
        self._max_images = max_images
        self._quota_bytes = quota_bytes
        self._lock = threading.RLock()
        self._handle = -1
        self._held: dict[bytes, manifest_pb2.Manifest] = {}  # oldest first
        self._stamps: dict[bytes, Stamps] = {}
        self._filling: dict[bytes, Partial] = {}
        self._pinned: frozenset[bytes] = frozenset()
        self._bases: list[bytes] = []

    def open(self) -> list[bytes]:
        """Takes the stage; the images that a former agent left and that `verify` may offer again.

        Raises StageTaken, StageUnsafe.
        """
        own_folder(self.root)
        self._handle = os.open(self.root / "stage.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StageTaken(self.root) from error
        with suppress(FileNotFoundError, json.JSONDecodeError):  # unreadable: the coordinator says it anew
            pinned = json.loads((self.root / "pinned.json").read_text())
            self._pinned = frozenset(bytes.fromhex(text) for text in pinned)
        return self._found()

    def close(self) -> None:
        """Lets the stage go; its images stay."""
        for partial in self._filling.values():
            partial.close()
        self._filling.clear()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    # --- what is there ---------------------------------------------------------------------------

    def held(self) -> list[bytes]:
        """Digests of whole, verified images."""
        with self._lock:
            return list(self._held)

    def images(self) -> list[Held]:
        with self._lock:
            return [
                Held(digest, image_bytes(manifest), tuple(self.pins.clients(digest)), digest in self._pinned)
                for digest, manifest in self._held.items()
            ]

    def manifest(self, digest: bytes) -> manifest_pb2.Manifest:
        """Of an image that is held. Raises NotStaged."""
        with self._lock:
            if digest not in self._held:
                raise NotStaged(digest)
            return self._held[digest]

    def folder(self, digest: bytes) -> Path:
        """Of an image that is held. Raises NotStaged."""
        self.manifest(digest)
        return self.root / digest.hex()

    def filling(self, digest: bytes) -> Partial | None:
        """The image while it comes. Waits for no lock."""
        return self._filling.get(digest)

    def peek(self, digest: bytes) -> manifest_pb2.Manifest | None:
        """Of an image that is held. Waits for no lock, which is held while room is made: for the event loop."""
        return self._held.get(digest)

    def base_of(self, manifest: manifest_pb2.Manifest) -> list[Base]:
        """The image that is most like one to come, the one used last of those that are equally; none if none is.

        It stays until it is closed.
        """
        with self._lock:
            held = dict(enumerate(self._held.items()))
            likest = max(((*likeness(other, manifest), at) for at, (_, other) in held.items()), default=(0, 0, 0))
            if not likest[0]:
                return []
            digest, other = held[likest[2]]
            try:
                base = Base(digest, other, self.root / digest.hex(), lambda: self._bases.remove(digest))
            except OSError as error:
                log.warning("image %s cannot be read, and is no base: %s", digest.hex()[:16], error)
                return []
            self._bases.append(digest)
            return [base]

    def used_bytes(self) -> int:
        """What images and unfinished ones take."""
        return sum(_allocated_bytes(path) for path in self.root.iterdir() if _digest_of(path) and path.is_dir())

    def room(self) -> Room:
        """What the next image may take without anything going. Waits for no lock."""
        room = self._room()
        return Room(max(0, room.free_bytes), room.limited_by)

    def _room(self) -> Room:
        """As `room`, less than nothing where more is promised than there is."""
        filling = list(self._filling.values())
        # Before what is free is measured: what is taken between the two must not count for neither.
        promised = sum(max(0, partial.bytes_total - _allocated_bytes(partial.folder)) for partial in filling)
        room = measure_room(self.root, used_bytes=self.used_bytes(), quota_bytes=self._quota_bytes)
        return Room(room.free_bytes - promised, room.limited_by)

    def left_manifest(self, digest: bytes) -> bytes | None:
        """The manifest kept beside an image or an unfinished one, if it is still what its name says."""
        with suppress(FileNotFoundError):
            blob = (self.root / f"{digest.hex()}{_MANIFEST}").read_bytes()
            if digest_of(blob) == digest:
                return blob
        return None

    # --- pins ------------------------------------------------------------------------------------

    def map(self, digest: bytes, client_id: str) -> Path:
        """Pins the image for a client; its folder. Raises NotStaged, ImageAltered."""
        with self._lock:
            folder = self.folder(digest)
            self._check_unaltered(digest)
            self.pins.add(digest, client_id)
            self._held[digest] = self._held.pop(digest)  # used last, goes last
            return folder

    def release(self, digest: bytes, client_id: str) -> bool:
        """Whether the client had it."""
        return self.pins.remove(digest, client_id)

    def set_pinned(self, digests: Iterable[bytes]) -> None:
        """What the coordinator needs to stay. Kept over a restart: its next word may take a while."""
        with self._lock:
            self._pinned = frozenset(digests)
            fresh = self.root / "pinned.json.new"
            fresh.write_text(json.dumps(sorted(digest.hex() for digest in self._pinned)))
            fresh.replace(self.root / "pinned.json")

    def is_whole(self, digest: bytes) -> bool:
        """Whether the image is held and nobody wrote to it since; one that is altered is held no longer."""
        with self._lock, suppress(NotStaged, ImageAltered):
            self.folder(digest)
            self._check_unaltered(digest)
            return True
        return False

    def _check_unaltered(self, digest: bytes) -> None:
        manifest, stamps = self._held[digest], self._stamps[digest]
        for file, then, now in zip(manifest.files, stamps, stamps_of(self.root / digest.hex(), manifest), strict=True):
            if then != now:
                del self._held[digest], self._stamps[digest]
                self._demote(digest)
                raise ImageAltered(digest, file.name)

    # --- an image comes --------------------------------------------------------------------------

    def verify(self, digest: bytes, progress: Progress | None = None) -> bool:
        """Offers an image that was left, if every byte is right; else it becomes an unfinished one."""
        blob = self.left_manifest(digest)
        folder = self.root / digest.hex()
        if blob is None:
            raise RuntimeError(f"{folder} has no manifest: `open` did not find it")
        manifest = parse_manifest(blob, allow_code=True)
        stamps = stamps_of(self.root / digest.hex(), manifest)  # before the bytes are read: what comes later is noticed
        whole = verify_folder(folder, manifest, progress=progress).ok
        if whole and inside(folder).keys() == {file.name for file in manifest.files}:
            with self._lock:
                self._held[digest], self._stamps[digest] = manifest, stamps
            return True
        self._demote(digest)
        return False

    def reserve(self, digest: bytes, blob: bytes) -> tuple[Partial, bool]:
        """Promises the image all the room it needs; whether there are buckets of it to scan. `blob` is its manifest.

        The room is taken with `allocate`; until then nobody else is promised it.

        Code rides along here: whoever published the version asked for it, and the digest says so.
        Others go for it if they must and may. Raises StageFull, BadImage.
        """
        manifest = parse_manifest(blob, allow_code=True)
        with self._lock:
            if digest in self._held or digest in self._filling:
                raise RuntimeError(f"image {digest.hex()[:16]} is staged or being staged")
            partial = Partial(self._partial_folder(digest), digest, manifest)
            needed_bytes = max(0, partial.bytes_total - _allocated_bytes(partial.folder))
            self._make_room(digest, needed_bytes)
            try:
                _write_manifest(self.root / f"{digest.hex()}{_MANIFEST}", blob)
                resumed = partial.create()
            except OSError as error:
                partial.close()
                if error.errno in _NO_ROOM:
                    full = self._full(partial)
                    self._drop(partial.folder)
                    raise full from error
                raise
            self._filling[digest] = partial
            return partial, resumed

    def allocate(self, partial: Partial, advanced: Callable[[], object], stop: Callable[[], bool]) -> None:
        """See Partial.allocate. Raises StageFull where somebody else took the room meanwhile, OSError."""
        try:
            partial.allocate(advanced, stop)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise self._full(partial) from error

    def _full(self, partial: Partial) -> StageFull:
        """Of an image whose room turned out not to be there."""
        room = measure_room(self.root, used_bytes=self.used_bytes(), quota_bytes=self._quota_bytes)
        needed_bytes = partial.bytes_total - _allocated_bytes(partial.folder)
        return StageFull(self.root, needed_bytes, max(0, room.free_bytes), room.limited_by)

    def finish(self, partial: Partial) -> Path:
        """Makes a filled image one that may be mapped."""
        if partial.missing:
            raise RuntimeError(f"{len(partial.missing)} buckets are missing")
        partial.close()
        wanted = {file.name for file in partial.manifest.files}
        for name, path in inside(partial.folder).items():
            if name in wanted:
                path.chmod(0o440)
            else:
                path.unlink()
        stamps = stamps_of(partial.folder, partial.manifest)
        with self._lock:
            folder = self.root / partial.digest.hex()
            failpoints.hit("stage.rename.before")
            partial.folder.replace(folder)
            failpoints.hit("stage.rename.after")
            self._held[partial.digest] = partial.manifest
            self._stamps[partial.digest] = stamps
            del self._filling[partial.digest]  # last: who looks without the lock finds one or the other
            return folder

    def abandon(self, partial: Partial, *, gone: bool = False) -> None:
        """Stops filling; what is good stays for the next try, unless it is to be `gone`."""
        partial.close()
        with self._lock:
            self._filling.pop(partial.digest, None)
            if gone:
                self._drop(partial.folder)

    # --- an image goes ---------------------------------------------------------------------------

    def _make_room(self, digest: bytes, needed_bytes: int) -> None:
        """Drops what may go, the least useful first, but nothing at all if it would not suffice."""
        victims = self._may_go(digest)
        room = self._room()
        if needed_bytes > room.free_bytes + sum(_allocated_bytes(path) for path in victims):
            raise StageFull(self.root, needed_bytes, max(0, room.free_bytes), room.limited_by)
        while victims and (needed_bytes > self._room().free_bytes or self._others(digest) >= self._max_images):
            self._drop(victims.pop(0))
        room = self._room()
        if needed_bytes > room.free_bytes:
            raise StageFull(self.root, needed_bytes, max(0, room.free_bytes), room.limited_by)

    def _others(self, digest: bytes) -> int:
        own = (digest.hex(), digest.hex() + _PARTIAL)
        return sum(1 for path in self.root.iterdir() if _digest_of(path) and path.is_dir() and path.name not in own)

    def _may_go(self, digest: bytes) -> list[Path]:
        """Unfinished images nobody fills, then whole ones nobody pins, oldest first."""
        folders = [path for path in self.root.iterdir() if path.is_dir()]
        unfinished = [
            path
            for path in folders
            if path.name.endswith(_PARTIAL) and _digest_of(path) not in {None, digest, *self._filling}
        ]
        whole = [
            self.root / held.hex()
            for held in self._held
            if held not in (digest, *self._pinned, *self._bases) and not self.pins.clients(held)
        ]
        return [*unfinished, *whole]

    def _drop(self, folder: Path) -> None:
        digest = _digest_of(folder)
        if digest is None:
            raise RuntimeError(f"{folder} is no image")
        if folder.exists():
            shutil.rmtree(folder)
        (self.root / f"{digest.hex()}{_MANIFEST}").unlink(missing_ok=True)
        self._held.pop(digest, None)
        self._stamps.pop(digest, None)
        self.pins.forget(digest)

    def _demote(self, digest: bytes) -> None:
        """Not whole any more: its good buckets serve the next staging."""
        folder, partial = self.root / digest.hex(), self._partial_folder(digest)
        if partial.exists():
            shutil.rmtree(partial)
        for path in inside(folder).values():
            path.chmod(0o600)
        folder.replace(partial)

    def _partial_folder(self, digest: bytes) -> Path:
        return self.root / f"{digest.hex()}{_PARTIAL}"

    def _found(self) -> list[bytes]:
        """Images left whole; what has no manifest, and manifests of nothing, are removed."""
        whole: list[bytes] = []
        for path in sorted(self.root.iterdir()):
            digest = _digest_of(path)
            if digest is None:
                continue
            if path.name.endswith(_MANIFEST):
                if not any((self.root / f"{digest.hex()}{kind}").exists() for kind in ("", _PARTIAL)):
                    path.unlink(missing_ok=True)
            elif not self._readable(digest):
                self._drop(path)
            elif not path.name.endswith(_PARTIAL):
                whole.append(digest)
        return whole

    def _readable(self, digest: bytes) -> bool:
        blob = self.left_manifest(digest)
        if blob is None:
            return False
        try:
            parse_manifest(blob, allow_code=True)
        except BadImage:
            return False
        return True


def safe_folder(root: Path, *, in_pod: bool) -> None:
    """As own_folder, where nobody else can put another folder in its place. Raises StageUnsafe, OSError."""
    _check_way(root, in_pod=in_pod)
    own_folder(root)
    _check_way(root, in_pod=in_pod)  # what was not there before


def _check_way(root: Path, *, in_pod: bool) -> None:
    if problem := weak_point(root, in_pod=in_pod):
        raise StageUnsafe(root, problem)


def own_folder(root: Path) -> None:
    """Makes the folder, 0700 and ours, and those on the way. Raises StageUnsafe, OSError."""
    for parent in reversed(root.parents):
        if not parent.exists():
            parent.mkdir(mode=0o755, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    state = root.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise StageUnsafe(root, "it is no folder")
    if state.st_uid != os.geteuid():
        raise StageUnsafe(root, f"it belongs to user {state.st_uid}, not {os.geteuid()}")
    if stat.S_IMODE(state.st_mode) != 0o700:
        root.chmod(0o700)


def _digest_of(path: Path) -> bytes | None:
    """The digest an entry of the stage is named by; None for anything else."""
    name = path.name.removesuffix(_PARTIAL).removesuffix(_MANIFEST)
    if len(name) != 64 or name != name.lower():
        return None
    try:
        return bytes.fromhex(name)
    except ValueError:
        return None


def _allocated_bytes(folder: Path) -> int:
    try:
        return sum(path.lstat().st_blocks * 512 for path in inside(folder).values())
    except FileNotFoundError:
        return 0


def _write_manifest(path: Path, blob: bytes) -> None:
    fresh = path.with_suffix(".new")
    try:
        fresh.write_bytes(blob)
        fresh.chmod(0o440)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
