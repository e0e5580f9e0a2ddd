"""Staged images in GPU memory, for this node's ranks to borrow: uploaded once, however many of them read it.

    BorrowImage: nobody lends it --> shares of the GPUs --> upload, beside serving --> lent, as by any other process
                                     (half of what is free, at most)                  freed when all have returned it

What finds no room is not lent, and ranks have it from the host. Nothing here is believed: they prove what they took.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hotweights.transports import cuda_ipc
from hotweights.transports.errors import TransportError
from hotweights.transports.threads import in_thread
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import manifest_pb2
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent.lending import LENT_MAX, Lending
from hotweights.worker_client.config import BadSetting
from hotweights.worker_client.image.layout import ALIGNED_BYTES, Layout
from hotweights.worker_client.stage.stage import Stage
from hotweights.worker_client.stage.threads import CalledOff

log = logging.getLogger(__name__)

LEASE_S = 600.0
WAIT_S = 0.5
PIECE_BYTES = 16 << 20
FREE_SHARE = 2
"""One part in so many of what is free on a GPU is taken: the rest is left to what serves there."""


@dataclass
class _Upload:
    task: "asyncio.Task[None]"
    lent: asyncio.Event


class Uploads:
    """Of one agent. Use from its event loop."""

    def __init__(self, stage: Stage, lending: Lending, gpus: Sequence[str]) -> None:
        """`gpus` as HOTWEIGHTS_LEND_GPUS has them; none lends nothing. Raises BadSetting."""
        self._stage = stage
        self._lending = lending
        self._gpus = chosen(gpus)
        self._uploads: dict[bytes, _Upload] = {}

    async def is_coming(self, digest: bytes) -> bool:
        """Whether an image will be lent soon; begins to upload it where nobody lends it. Waits for WAIT_S at most."""
        manifest = self._stage.peek(digest)
        if not self._gpus or manifest is None or self._lending.lends(digest):
            return False
        upload = self._uploads.get(digest)
        if upload is None:
            if len(self._uploads) >= LENT_MAX:
                return False
            lent = asyncio.Event()
            upload = _Upload(asyncio.ensure_future(self._lend(digest, manifest, lent)), lent)
            self._uploads[digest] = upload
            upload.task.add_done_callback(lambda task: self._ended(digest, task))
        until = asyncio.ensure_future(upload.lent.wait())
        try:
            await asyncio.wait({until, upload.task}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            until.cancel()
        return not upload.lent.is_set() and not upload.task.done()

    async def close(self) -> None:
        """Frees everything. Who has it open reads on."""
        tasks = {upload.task for upload in self._uploads.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _ended(self, digest: bytes, task: "asyncio.Task[None]") -> None:
        del self._uploads[digest]
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("lending GPU memory ended in a way nobody foresaw", exc_info=bug)

    async def _lend(self, digest: bytes, manifest: manifest_pb2.Manifest, lent: asyncio.Event) -> None:
        """Uploads and lends it until it may be freed."""
        folder = self._stage.root / digest.hex()
        memories: list[cuda_ipc.Lent] = []  # filled even when we are cancelled meanwhile
        try:
            told = await in_thread(lambda stop: _uploaded(folder, manifest, self._gpus, memories, stop))
            request = pb.LendImageRequest(manifest_digest=digest, memories=told, lease_s=LEASE_S)
            async for _ in self._lending.lend(request, is_wanted=True):
                lent.set()
        except (TransportError, OSError, Refused) as error:
            so = "is lent no more" if lent.is_set() else "is not lent, ranks have it from host memory"
            log.warning("image %s %s: %s", digest.hex()[:16], so, error)
        finally:
            for memory in memories:
                with suppress(TransportError):  # a GPU that has failed has nothing to be freed
                    memory.close()


def chosen(gpus: Sequence[str]) -> dict[str, int]:
    """UUID to ordinal. Raises BadSetting for what this process does not see."""
    if not gpus:
        return {}
    text = ",".join(gpus)
    try:
        there = cuda_ipc.devices()
    except TransportError as error:
        raise BadSetting("HOTWEIGHTS_LEND_GPUS", text, str(error)) from error
    if tuple(gpus) == ("all",):
        return there
    if missing := [name for name in gpus if name not in there]:
        raise BadSetting(
            "HOTWEIGHTS_LEND_GPUS", text, f"there is no {missing[0]} here; takes all, or of {', '.join(there)}"
        )
    return {name: there[name] for name in gpus}


def even(total_bytes: int, rooms: Sequence[int]) -> list[int]:
    """What each takes of that much, the same of all as far as their rooms go."""
    shares, takers = [0] * len(rooms), len(rooms)
    for at in sorted(range(len(rooms)), key=rooms.__getitem__):
        shares[at] = min(rooms[at], -(-total_bytes // takers))
        total_bytes, takers = total_bytes - shares[at], takers - 1
    return shares


def laid_out(manifest: manifest_pb2.Manifest, rooms: Mapping[str, int]) -> list[Layout]:
    """The image's tensors in memory of several GPUs, one after the other; `rooms` are bytes by UUID.

    What finds no room is nowhere.
    """
    tensors = [tensor for tensor in manifest.tensors if tensor.size_bytes]
    largest = max((tensor.size_bytes for tensor in tensors), default=0)
    wanted = even(sum(tensor.size_bytes for tensor in tensors), list(rooms.values()))
    layouts = [Layout(name) for name in rooms]
    # No tensor is cut in two: a share may end one later.
    limits = [min(room, part + largest) for room, part in zip(rooms.values(), wanted, strict=True)]
    for tensor in tensors:
        needed_bytes = tensor.size_bytes + 2 * ALIGNED_BYTES
        for layout, limit in zip(layouts, limits, strict=True):
            if layout.size_bytes + needed_bytes <= limit:
                layout.add(manifest.files[tensor.file].name, tensor.offset, tensor.size_bytes)
                break
    return [layout for layout in layouts if layout.told.ranges]


def _uploaded(
    folder: Path,
    manifest: manifest_pb2.Manifest,
    gpus: Mapping[str, int],
    memories: list[cuda_ipc.Lent],
    stop: Callable[[], bool],
) -> list[pb.DeviceMemory]:
    """What borrowers need to know of `memories`, which are added. Raises TransportError, OSError, CalledOff."""
    rooms = {name: cuda_ipc.free_bytes(ordinal) // FREE_SHARE for name, ordinal in gpus.items()}
    layouts, piece = laid_out(manifest, rooms), bytearray(PIECE_BYTES)
    if not layouts:
        raise TransportError(f"no GPU has room for a part of it; half of what is free is {sum(rooms.values())} bytes")
    for layout in layouts:
        memory = cuda_ipc.Lent(gpus[layout.told.device_uuid], layout.size_bytes)
        memories.append(memory)
        memory.write(0, layout.told.seal)
        for part in layout.told.ranges:
            _upload(folder / part.file, part, memory, memoryview(piece), stop)
        cuda_ipc.synchronize(memory.ordinal)  # the last pieces may be on their way still
        layout.told.handle = memory.handle
    return [layout.told for layout in layouts]


def _upload(
    path: Path, part: pb.DeviceRange, memory: cuda_ipc.Lent, piece: memoryview, stop: Callable[[], bool]
) -> None:
    """By pieces: what the driver copies twice stays in the cache."""
    with path.open("rb", buffering=0) as file:
        file.seek(part.file_offset)
        done = 0
        while done < part.size_bytes:
            if stop():
                raise CalledOff
            got = file.readinto(piece[: part.size_bytes - done])
            if not got:
                raise OSError(f"{path} ends before byte {part.file_offset + part.size_bytes}")
            memory.write(part.memory_offset + done, piece[:got])
            done += got
