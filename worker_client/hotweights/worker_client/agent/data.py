"""The data port: buckets of this node for other agents, and the way to theirs.

another agent --token, range--> tcp server --> staged image (mapped), what is verified of one that comes,
                                               else a folder (read, its stamps checked)
                                               or where that folder is, if the other sees it too

Where this node has a certificate, both ways are over TLS (tcps://) and nothing of either is in plaintext.
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hotweights.transports.address import parse_address
from hotweights.transports.base import Connection, FileRange, Place, Range, Server, Transport, in_memory
from hotweights.transports.errors import NotHeld, NotYet, PeerGone, TlsFailed, TransportMissing
from hotweights.transports.line import Tls
from hotweights.transports.pace import Pace
from hotweights.transports.registry import choose_transport, open_transport
from hotweights.transports.shared import is_below
from hotweights.v1 import manifest_pb2
from hotweights.v1.worker_service_pb2 import Source
from hotweights.wire.allowance import Allowance, Rate
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.tokens import KEY_BYTES, BadToken, check_token
from hotweights.worker_client.agent.deltas import KEPT_BYTES, USELESS_MAX, Deltas, Rooms, Worth, changed_buckets
from hotweights.worker_client.agent.folders import Folders, Known
from hotweights.worker_client.image.delta import make_delta
from hotweights.worker_client.image.digests import on_all_cores, usable_cores
from hotweights.worker_client.image.errors import BadImage, FolderChanged
from hotweights.worker_client.image.manifest import Image
from hotweights.worker_client.image.reader import BucketReader
from hotweights.worker_client.stage.partial import Partial
from hotweights.worker_client.stage.stage import Stage

log = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 10.0
# Of what strangers do, so much is logged.
OF_ONE_HOST, OF_ALL_HOSTS = Rate(burst=5, every_s=60.0), Rate(burst=20, every_s=10.0)
TRANSPORT, OVER_TLS = "tcp", "tcps"
MAKING_MAX = 4  # deltas that are being made at once: each takes up to four times its bucket


class DataPort:
    """Serves what the stage and the folders hold to who shows a token of ours."""

    def __init__(
        self,
        node: str,
        stage: Stage,
        folders: Folders,
        tls: Tls | None = None,
        *,
        bandwidth_max: float | None = None,
        transport: str = "auto",
        ucx: Mapping[str, str] | None = None,
        shared: Sequence[Path] = (),
    ) -> None:
        """`bandwidth_max` is in bytes a second, for what is sent. `transport` is one of registry.CHOICES.

        What lies below the folders `shared` others may read in place, as this node reads theirs.
        """
        self.token_key = secrets.token_bytes(KEY_BYTES)
        self.endpoint = ""
        self.served_at = time.monotonic()
        self._node = node
        self._tls = tls
        self._pace = Pace(bandwidth_max)
        self._wanted, self._ucx, self._shared = transport, ucx or {}, shared
        self._transport: Transport | None = None
        self._others: dict[bool, Transport] = {}  # of sources that are read another way than this node serves
        self._stage = stage
        self._folders = folders
        self._reader = BucketReader()
        self._server: Server | None = None
        self._deltas = Deltas()
        self._rooms = Rooms(MAKING_MAX)
        self._worth = Worth()
        self._allowance = Allowance(OF_ONE_HOST, OF_ALL_HOSTS)
        self._withdraw: Callable[[bytes, str], None] = lambda digest, why: None
        self._arrivals: dict[bytes, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0

    async def start(self, listen: str, advertise: str, *, tls_only: bool = False) -> None:
        """Raises OSError, and ValueError for an address that readers could not use.

        With `tls_only` an address that other machines reach is refused without a certificate.
        """
        host, port = parse_address(listen)
        if self._tls is None and not Endpoint(host, port).is_loopback:
            if tls_only:
                raise ValueError(
                    f"HOTWEIGHTS_LISTEN={listen} is reached by other machines, and the coordinator's grpcs:// asks for "
                    "TLS: set HOTWEIGHTS_CERT and HOTWEIGHTS_KEY"
                )
            log.warning("other machines reach %s, and what it serves travels in plaintext", listen)
        if not advertise and host in ("0.0.0.0", "::"):
            raise ValueError(f"HOTWEIGHTS_LISTEN={listen} is every address: say which one with HOTWEIGHTS_ADVERTISE")
        self._loop = loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

        def withdraw(digest: bytes, why: str) -> None:
            loop.call_soon_threadsafe(self._folders.withdraw, digest, why)

        self._withdraw = withdraw
        if self._wanted == "mpi":  # which waits for the other ranks of its job
            self._transport = await asyncio.to_thread(self._open_transport)
        else:
            self._transport = self._open_transport()
        self._server = await self._transport.serve(self, listen, check=self._check, advertise=advertise or None)
        address = self._server.address
        scheme = TRANSPORT if self._tls is None else OVER_TLS
        self.endpoint = address if "://" in address else f"{scheme}://{address}"

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def connect(self, source: Source) -> Connection:
        """To another agent's data port. Raises TransportError."""
        name, separator, address = source.data_endpoint.partition("://")
        if not separator:
            name, address = TRANSPORT, source.data_endpoint
        try:
            if name not in (TRANSPORT, OVER_TLS):  # the scheme is the peer's word: it chooses nothing else
                raise PeerGone(source.data_endpoint, f"serves over {name!r}; this node reads over tcp and tcps")
            tls = self._tls_to(name, address)
            transport = self._transport if name == TRANSPORT and self._tls is None else None
            if transport is None:
                transport = self._others.get(tls is None) or open_transport(TRANSPORT, tls, shared=self._shared)
                self._others[tls is None] = transport
            return await transport.connect(address, token=source.token, deadline_s=CONNECT_DEADLINE_S)
        except ValueError as error:  # an address or a token that is none
            raise PeerGone(source.data_endpoint, str(error)) from error

    def _open_transport(self) -> Transport:
        """Raises ValueError where what was asked for cannot be."""
        if self._wanted == "auto":
            return choose_transport(self._tls, self._warn, self._pace, ucx=self._ucx, shared=self._shared)
        if self._wanted in ("ucx", "mpi") and self._tls is not None:
            raise ValueError(
                f"HOTWEIGHTS_TRANSPORT={self._wanted} sends buckets in plaintext, and this node has a certificate "
                "(HOTWEIGHTS_CERT): take tcp, which goes over TLS, or leave the certificate out"
            )
        try:
            return open_transport(self._wanted, self._tls, self._warn, self._pace, ucx=self._ucx, shared=self._shared)
        except TransportMissing as missing:
            raise ValueError(f"HOTWEIGHTS_TRANSPORT={self._wanted}: {missing}") from missing

    def _tls_to(self, name: str, address: str) -> Tls | None:
        """Raises TlsFailed, and ValueError for an address that is none."""
        if name == OVER_TLS:
            if self._tls is None:
                raise TlsFailed(address, "speaks TLS only, and this node has no HOTWEIGHTS_CERT and HOTWEIGHTS_KEY")
            return self._tls
        if self._tls is not None and name == TRANSPORT and not Endpoint(*parse_address(address)).is_loopback:
            raise TlsFailed(address, "serves in plaintext, and this node has a certificate: give that node one too")
        return None

    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> Range | None:
        """See BucketSource."""
        self.served_at = time.monotonic()
        partial = self._stage.filling(image)  # before what is held, which it becomes
        if (manifest := self._stage.peek(image)) is not None:
            return self._staged(manifest, image, file, offset, size)
        if partial is None or self._folders.peek(image) is not None:
            return None
        return _coming(partial, image, file, offset, size)

    def open(self, image: bytes, file: int, offset: int, size: int) -> memoryview:
        """See BucketSource. In a thread."""
        with self._folder_of(image, file, offset, size) as known:
            return self._reader.read_range(known.image, file, offset, size)

    def _read(self, image: bytes, file: int, offset: int, into: memoryview) -> None:
        """As open, into memory that is there. Raises NotHeld, OSError."""
        with self._folder_of(image, file, offset, len(into)) as known:
            self._reader.read_into(known.image, file, offset, into)

    @contextmanager
    def _folder_of(self, image: bytes, file: int, offset: int, size: int) -> Iterator[Known]:
        """The folder to read a range from; it is withdrawn where it changed. Raises NotHeld."""
        known = self._folders.peek(image)
        if known is None:
            raise NotHeld(image, file, offset, size)
        try:
            yield known
        except FolderChanged as error:
            self._withdraw(image, str(error))
            raise NotHeld(image, file, offset, size, str(error)) from error
        except ValueError as error:
            raise NotHeld(image, file, offset, size, str(error)) from error

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> bytes | None:
        """See BucketSource."""
        self.served_at = time.monotonic()
        return self._deltas.get((image, base, file, offset, size))

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        """See BucketSource. In a thread."""
        key = image, base, file, offset, view.nbytes
        known = self._deltas.get(key)  # made while this range was opened
        if known is not None:
            return known
        manifest = self._stage.peek(base)
        if manifest is None and self._folders.peek(base) is None:
            return None
        if not self._worth.is_tried(image, base):
            return None
        with self._rooms.take(view.nbytes if manifest is None else 0) as room:
            try:
                if manifest is not None:
                    before = in_memory(self._staged(manifest, base, file, offset, view.nbytes))
                else:
                    self._read(base, file, offset, room)
                    before = room
            except (NotHeld, OSError):
                return None
            made = make_delta(view, before)
        self._worth.tell(image, base, useful=made is not None)
        if made is not None:
            self._deltas.put(key, made)
        return made

    def foresee(self, target: Image, base: Image, stop: Callable[[], bool]) -> int:
        """Makes deltas of `target` to `base` before anybody asks, as many as are kept; how many bytes. In a thread.

        Ends where the first few show that it is not worth it, and at what cannot be read any more.
        """
        kept = tried = 0
        ended, rooms = threading.Event(), Rooms(MAKING_MAX)

        def make(bucket: manifest_pb2.Bucket, _: memoryview) -> None:
            nonlocal kept, tried
            if ended.is_set() or stop():
                return
            with rooms.take(bucket.size_bytes) as view:
                try:
                    self._read(target.digest, bucket.file, bucket.offset, view)
                except (NotHeld, OSError) as error:
                    log.info("no deltas are made beforehand: %s", error)
                    ended.set()
                    return
                made = self.delta(target.digest, base.digest, bucket.file, bucket.offset, view)
            kept, tried = kept + len(made or b""), tried + 1  # of threads: rough figures do
            if kept >= KEPT_BYTES or (not kept and tried >= USELESS_MAX):
                ended.set()

        on_all_cores(changed_buckets(target.manifest, base.manifest), make, min(usable_cores(), MAKING_MAX))
        return kept

    def locate(self, image: bytes, file: int) -> Place | None:
        """See BucketSource. In a thread."""
        known = self._folders.peek(image) if self._shared else None
        if known is None or file >= len(known.image.stamps):
            return None
        try:
            path = str(known.image.path(file))
        except BadImage:  # it is gone: who reads from us is told so
            return None
        stamp = known.image.stamps[file]
        return Place(path, stamp.size_bytes, stamp.mtime_ns) if is_below(path, self._shared) else None

    def received(self, image: bytes, base: bytes, bucket: manifest_pb2.Bucket, delta: bytes) -> None:
        """A delta that was right is given on: readers of this node have mostly the same base."""
        self._deltas.put((image, base, bucket.file, bucket.offset, bucket.size_bytes), delta)

    async def until_more(self, image: bytes) -> None:
        """See BucketSource."""
        if self._stage.filling(image) is None:
            return
        arrival = self._arrivals.setdefault(image, asyncio.get_running_loop().create_future())
        await asyncio.shield(arrival)

    def arrived(self, image: bytes) -> None:
        """More of an image is here, or nothing more will come. From any thread."""
        if threading.get_ident() == self._loop_thread:
            self._tell(image)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._tell, image)

    def _tell(self, image: bytes) -> None:
        if (arrival := self._arrivals.pop(image, None)) is not None:
            arrival.set_result(None)

    def _staged(self, manifest: manifest_pb2.Manifest, image: bytes, file: int, offset: int, size: int) -> FileRange:
        files = manifest.files
        if not 0 <= file < len(files) or offset + size > files[file].size_bytes:
            raise NotHeld(image, file, offset, size, "there is no such range")
        try:
            handle = os.open(self._stage.root / image.hex() / files[file].name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:  # it went this instant
            raise NotHeld(image, file, offset, size, "it was given up") from error
        if os.fstat(handle).st_size != files[file].size_bytes:
            os.close(handle)
            raise NotHeld(image, file, offset, size, "its file was altered")
        return FileRange(handle, offset, size)  # which stays, even if the image goes meanwhile

    def _check(self, token: bytes, image: bytes) -> bool:
        try:
            check_token(self.token_key, token, image, self._node, time.time())
        except BadToken as error:
            self._warn("", f"a reader of image {image.hex()[:16]} was turned away: {error}")
            return False
        return True

    def _warn(self, host: str, text: str) -> None:
        """On the event loop. The rest is counted: strangers must not push everything else out of the log."""
        if (passed_over := self._allowance.take(host)) is not None:
            more = f" ({passed_over} more were not logged since the last that was)" if passed_over else ""
            log.warning("%s%s", text, more)


def _coming(partial: Partial, image: bytes, file: int, offset: int, size: int) -> memoryview:
    """Of an image that is on its way here. Raises NotHeld, NotYet."""
    try:
        view = partial.held(file, offset, size)
    except IndexError as error:
        raise NotHeld(image, file, offset, size, str(error)) from error
    if view is None:
        raise NotYet(image, partial.bytes_done)
    return view
