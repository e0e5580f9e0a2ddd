"""How an image gets into the stage: what is there is verified, the rest copied from a folder or fetched.

held ---------------------------------------------------------------> done
left by a former agent --verify--> done, or unfinished
unfinished or absent --reserve, scan--> copy from a folder of this node, fetch from sources --finish--> done
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hotweights.transports.pace import Pace
from hotweights.transports.threads import in_thread, outlast
from hotweights.v1 import worker_service_pb2
from hotweights.wire import failpoints
from hotweights.worker_client.agent.folders import Folders
from hotweights.worker_client.agent.work import Work
from hotweights.worker_client.image.errors import FolderChanged
from hotweights.worker_client.stage.allocating import Allocating
from hotweights.worker_client.stage.base import Base
from hotweights.worker_client.stage.copy import copy_folder
from hotweights.worker_client.stage.errors import SourcesFailed, StageFull
from hotweights.worker_client.stage.fetch import PARALLEL, Fetch, Open, Received, Tally
from hotweights.worker_client.stage.partial import Partial, Progress
from hotweights.worker_client.stage.stage import Stage
from hotweights.worker_client.stage.threads import Figures, stoppable

log = logging.getLogger(__name__)

# Buckets on their way where deltas are asked for: they cost processors at both ends, and hardly the wire.
DELTAS_AT_ONCE = 4

Source = worker_service_pb2.Source


class Staging(Work[None]):
    """One image on its way; who joins may bring more sources."""

    sources: list[Source]
    tally: Tally


class Images:
    """The stage as the agent uses it: one work an image, whoever asks. Use from one event loop."""

    def __init__(
        self,
        stage: Stage,
        folders: Folders,
        manifest_of: Callable[[bytes], Awaitable[bytes]],
        changed: Callable[[], None],
        open_source: Open,
        arrived: Callable[[bytes], None] = lambda digest: None,
        received: Received = lambda image, base, bucket, delta: None,
        *,
        bandwidth_max: float | None = None,
        connections: int = PARALLEL,
    ) -> None:
        """`arrived` hears, in any thread, of each bucket of an image that came, and of its end; `received` of deltas.

        `bandwidth_max` is in bytes a second, for what is fetched: of all images together. `connections` are of one.
        """
        self.stage = stage
        self._folders = folders
        self._manifest_of = manifest_of
        self._changed = changed
        self._open_source = open_source
        self._arrived = arrived
        self._received = received
        self._pace = Pace(bandwidth_max)
        self._connections = connections
        self._staging: dict[bytes, Staging] = {}
        self._to_verify: dict[bytes, Work[bool]] = {}

    def is_busy(self) -> bool:
        return any(not staging.task.done() for staging in self._staging.values())

    def verify_found(self, found: list[bytes]) -> None:
        """Begins to verify what a former agent left, one image after the other."""
        one_by_one = asyncio.Lock()
        for digest in found:
            figures = Figures()
            work = Work(self._verify(digest, figures, one_by_one), figures, kept=True)
            self._to_verify[digest] = work

    def begin(self, digest: bytes, sources: list[Source]) -> Staging:
        """The work that ends with the image held. It goes on while somebody waits for it."""
        staging = self._staging.get(digest)
        if staging is None or staging.is_over:
            figures, wanted, tally = Figures(), list(sources), Tally()
            before = staging.task if staging is not None else None
            staging = Staging(self._bring(digest, wanted, figures, tally, before), figures, kept=False)
            staging.sources, staging.tally = wanted, tally
            self._staging[digest] = staging
            staging.task.add_done_callback(lambda _: self._tidy(digest))
        else:
            fresh = {source.node_id: source for source in sources}  # of an agent that was started again too
            staging.sources[:] = [fresh.pop(source.node_id, source) for source in staging.sources]
            staging.sources += fresh.values()
        return staging

    def _tidy(self, digest: bytes) -> None:
        staging = self._staging.get(digest)
        if staging is not None and staging.task.done():
            del self._staging[digest]

    async def settled(self, digest: bytes) -> None:
        """Waits until an image that a former agent left is verified or given up."""
        work = self._to_verify.get(digest)
        if work is not None:
            await asyncio.wait({work.task})

    async def close(self) -> None:
        tasks: list[asyncio.Task[None] | asyncio.Task[bool]] = [work.task for work in self._staging.values()]
        tasks += [work.task for work in self._to_verify.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _verify(self, digest: bytes, figures: Figures, one_by_one: asyncio.Lock) -> bool:
        try:
            async with one_by_one:
                whole = await in_thread(lambda stop: self.stage.verify(digest, stoppable(figures.write, stop)))
        finally:
            del self._to_verify[digest]
        log.info("image %s left by a former agent: %s", digest.hex()[:16], "whole" if whole else "not whole")
        self._changed()
        return whole

    async def _bring(
        self,
        digest: bytes,
        sources: list[Source],
        figures: Figures,
        tally: Tally,
        before: "asyncio.Task[None] | None",
    ) -> None:
        if before is not None:  # called off, and still letting go of the image
            await asyncio.wait({before})
        await self.settled(digest)
        if await asyncio.to_thread(self.stage.is_whole, digest):
            return
        failpoints.hit("stage.begin")
        if not sources:  # what a former agent served is not known again at once: it is hashed first
            await self._folders.recalled(digest)
        blob = await self._find_manifest(digest, sources)
        reserved: list[tuple[Partial, bool]] = []  # filled even when we are cancelled meanwhile
        room, full = None, False
        try:
            await in_thread(lambda _: reserved.append(self.stage.reserve(digest, blob)))
            partial, resumed = reserved[0]
            room = Allocating(self.stage, partial)
            if resumed:
                await room.all()
                await in_thread(lambda stop: partial.scan(stoppable(figures.write, stop)))
                log.info("image %s: %d buckets are to come", digest.hex()[:16], len(partial.missing))
            figures.write(partial.bytes_done, partial.bytes_total)
            await self._fill(partial, sources, figures, tally, room)
            await in_thread(lambda _: self.stage.finish(partial))
            log.info("image %s is staged: %d bytes", digest.hex()[:16], partial.bytes_total)
        except StageFull:
            full = True
            raise
        finally:
            try:
                if room is not None:
                    await room.close()
                for unfinished, _ in reserved:
                    await self._abandon(unfinished, gone=full)
            finally:
                self._arrived(digest)
                self._changed()

    async def _abandon(self, partial: Partial, *, gone: bool) -> None:
        """In a thread: freeing a large image takes long. Raises OSError."""
        work = asyncio.ensure_future(asyncio.to_thread(self.stage.abandon, partial, gone=gone))
        await outlast(work)
        work.result()

    async def _find_manifest(self, digest: bytes, sources: list[Source]) -> bytes:
        known = self._folders.find(digest)
        if known is not None:
            return known.image.blob
        left = self.stage.left_manifest(digest)
        if left is not None:
            return left
        if not sources:
            raise SourcesFailed(digest, [])
        return await self._manifest_of(digest)

    async def _fill(
        self, partial: Partial, sources: list[Source], figures: Figures, tally: Tally, room: Allocating
    ) -> None:
        """From a folder of this node if there is one, else, or if it changed, from the sources."""

        def progress(bytes_done: int, bytes_total: int) -> None:
            figures.write(bytes_done, bytes_total)
            self._arrived(partial.digest)

        known = self._folders.find(partial.digest) if partial.missing else None
        if known is not None:
            image = known.image
            await room.all()
            try:
                await in_thread(lambda stop: copy_folder(partial, image, stoppable(progress, stop)))
            except FolderChanged as error:
                self._folders.withdraw(partial.digest, str(error))
                if not sources:
                    raise
        if not partial.missing:
            return
        bases: list[Base] = []  # filled even when we are cancelled meanwhile
        try:
            await in_thread(lambda _: bases.extend(self.stage.base_of(partial.manifest)))
            await self._take_over(partial, bases[0] if bases else None, sources, progress, tally, room)
        finally:
            for base in bases:
                base.close()

    async def _take_over(
        self,
        partial: Partial,
        base: Base | None,
        sources: list[Source],
        progress: Progress,
        tally: Tally,
        room: Allocating,
    ) -> None:
        """What is unchanged from `base`, the rest from the sources, as deltas to it where they have it too."""
        parallel = self._connections
        if base is not None:
            for index in base.unchanged(partial):
                await room.of(index)
            await in_thread(lambda stop: base.copy_unchanged(partial, stoppable(progress, stop)))
            parallel = max(parallel, DELTAS_AT_ONCE)
        if partial.missing:
            fetch = Fetch(
                partial,
                sources,
                self._open_source,
                progress,
                parallel=parallel,
                pace=self._pace,
                tally=tally,
                room=room.of,
            )
            fetch.ask_deltas(base, self._received)
            await fetch.run()
