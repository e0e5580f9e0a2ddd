"""Before the pause: the node's agent maps an image, every rank checks it and makes ready what will be written.

digest --the agent maps--> folder --every rank: compare, copy, hash, assemble--> Prepared --release--> nothing is held
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotweights.v1 import agent_service_pb2, fleet_pb2
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.window.engine import Engine, Status
from hotweights.worker_client.window.identify import FAILED, Images
from hotweights.worker_client.window.window import Unanswered, call_ranks, fingerprints, refusals, within

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 10.0
RELEASE_DEADLINE_S = 60.0
RELEASE_POLL_S = 0.1
POLL_S = 0.02
REASONS_MAX = 8
UPLOAD_SHARE = 0.1
"""Of the time there is to prepare: so long an upload into GPU memory is waited for."""


class PrepareRefused(Exception):
    """The image cannot be applied here; the text says why. Nothing that serves was touched."""


@dataclass(frozen=True)
class Prepared:
    """An image that every rank has mapped and checked."""

    digest: bytes
    folder: Path
    before: tuple[bytes, ...]
    """What the ranks proved to serve meanwhile."""
    expected: tuple[bytes, ...]
    """What they will prove to serve; empty of a rank of which that shows only then."""
    checked_finite: bool
    caches_spoilt: bool
    routes: fleet_pb2.Routes
    """Of all ranks together."""
    base: Path | None = None
    """The image that they serve, where it lies on this node."""


class Preparing:
    """Of one engine. Use from the controller's loop only."""

    def __init__(
        self,
        engine: Engine,
        connect_agent: Callable[[], Awaitable[Images]],
        replica_id: str,
        name_map: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._connect_agent = connect_agent
        self._replica_id = replica_id
        self._name_map = dict(name_map)
        self._clock = clock
        self._agent: Images | None = None
        self._mapped: set[bytes] = set()
        self._lent: set[bytes] = set()
        self.prepared: Prepared | None = None

    def holds(self, digest: bytes, *, check_finite: bool = False) -> bool:
        """Whether that much was prepared already."""
        held = self.prepared
        return held is not None and held.digest == digest and (held.checked_finite or not check_finite)

    async def agent(self) -> Images:
        """The node's agent. Raises Unanswered and what connecting raises."""
        if self._agent is None:
            self._agent = await within(CALL_DEADLINE_S * 3, "the agent", self._connect_agent())
        return self._agent

    async def map(self, digest: bytes, deadline_s: float) -> Path:
        """Where the image lies on this node. Raises HotweightsError, Unanswered, OSError."""
        agent = await self.agent()
        folder = await within(deadline_s, "the agent", agent.map_image(digest, self._replica_id))
        self._mapped.add(digest)
        return folder

    @contextlib.asynccontextmanager
    async def borrowed(self, digest: bytes, deadline_s: float) -> AsyncIterator[Path | None]:
        """Where the image lies that the ranks serve, for them to prove their load plans with; None where it is not."""
        folder, held = None, digest in self._mapped
        if digest:
            try:
                folder = await self.map(digest, deadline_s)
            except FAILED as error:
                log.info("the image that is served is not here, so that nothing is written directly: %s", error)
        try:
            yield folder
        finally:
            if folder is not None and not held:
                await self._unmap(digest)

    async def check(
        self, digest: bytes, folder: Path, deadline_s: float, *, check_finite: bool, base: Path | None, anew: bool
    ) -> Prepared:
        """Every rank checks; what they had for another image, and the way back from it, they drop.

        `base` is the image that they serve, where it lies on this node; `anew` drops what they had for this one.
        Raises PrepareRefused and what fails outside.
        """
        ends = self._clock() + deadline_s
        self.prepared = None
        options = {
            "check_finite": check_finite,
            "base": str(base or ""),
            "anew": anew,
            "lent": await self._borrow(digest),
        }
        plain = str(folder), self._name_map, options
        answers = await call_ranks(self._engine, "hotweights_prepare", CALL_DEADLINE_S, *plain)
        if failed := refusals(answers):
            raise PrepareRefused(failed)
        answers = await self._poll(ends, deadline_s)
        await self._return(but=digest)  # what was prepared before, the ranks have dropped
        # Asked again: what the ranks have read by now is what was verified, or the agent says that it is not.
        await self.map(digest, deadline_s)
        spoilt = any(answer.get("caches_spoilt") for answer in answers)
        self.prepared = Prepared(
            digest=digest,
            folder=folder,
            before=fingerprints(answers),
            expected=fingerprints(answers, "expected"),
            checked_finite=check_finite,
            caches_spoilt=spoilt,
            routes=_routes([answer["routes"] for answer in answers]),
            base=base,
        )
        return self.prepared

    async def await_upload(self, digest: bytes, deadline_s: float) -> None:
        """Where the agent is to upload the image into GPU memory, it begins; returns when it has, or soon enough.

        Only before there is any hurry: what is prepared in a window takes what is there.
        """
        ends = self._clock() + deadline_s * UPLOAD_SHARE
        while True:
            found = await self._ask(digest, upload=True)
            if not found.coming or self._clock() >= ends:
                return
            await asyncio.sleep(POLL_S)

    async def _borrow(self, digest: bytes) -> dict[str, Any]:
        """GPU memory of this node that holds the image, as plain data; empty where there is none to be had."""
        found = await self._ask(digest, upload=False)
        if not found.memories:
            return {}
        return {"left_s": found.left_s, "memories": [_plain(memory) for memory in found.memories]}

    async def _ask(self, digest: bytes, *, upload: bool) -> agent_service_pb2.BorrowImageResponse:
        """What the agent has lent us, which is to be returned."""
        try:
            agent = await self.agent()
            asked = agent.borrow_image(digest, self._replica_id, upload=upload)
            found = await within(CALL_DEADLINE_S, "the agent", asked)
        except (HotweightsError, Unanswered, OSError) as error:
            log.warning("values come from host memory: %s", error)
            return agent_service_pb2.BorrowImageResponse()
        if found.memories:
            self._lent.add(digest)
        return found

    async def _return(self, but: bytes = b"") -> None:
        """Once no rank reads what was borrowed."""
        for digest in sorted(self._lent - {but}):
            self._lent.discard(digest)
            try:
                agent = await self.agent()
                await within(CALL_DEADLINE_S, "the agent", agent.return_image(digest, self._replica_id))
            except (HotweightsError, Unanswered, OSError) as error:
                log.info("the agent did not hear that GPU memory was returned; its lease will end: %s", error)

    async def _poll(self, ends: float, deadline_s: float) -> list[Status]:
        while self._clock() < ends:
            answers = await call_ranks(self._engine, "hotweights_prepared", CALL_DEADLINE_S)
            if failed := refusals(answers):
                raise PrepareRefused(failed)
            if all(answer["done"] for answer in answers):
                return answers
            await asyncio.sleep(POLL_S)
        raise Unanswered("preparing", deadline_s)

    async def release(self, served: bytes, wait_s: float = 0.0, retain: Path | None = None) -> None:
        """Asks the ranks to let go, those that still prepare again for `wait_s`; the agent takes back all but `served`.

        `retain` is the image that served before: the ranks keep the way back ready where they can. Raises Unanswered,
        Unproven, EngineFailed.
        """
        self.prepared = None
        ends, options = self._clock() + wait_s, {"retain": str(retain or "")}
        answers = await call_ranks(self._engine, "hotweights_release", CALL_DEADLINE_S, options)
        while refusals(answers) and self._clock() < ends:
            await asyncio.sleep(RELEASE_POLL_S)
            answers = await call_ranks(self._engine, "hotweights_release", CALL_DEADLINE_S, options)
        if failed := refusals(answers):
            # Still mapped somewhere: the agent must keep the files, so it is not told.
            log.warning("images stay mapped: %s", failed)
            return
        await self._return()
        for digest in sorted(self._mapped - {served}):
            await self._unmap(digest)

    async def _unmap(self, digest: bytes) -> None:
        """Once no rank maps it."""
        try:
            agent = await self.agent()
            await within(CALL_DEADLINE_S, "the agent", agent.release_image(digest, self._replica_id))
        except (HotweightsError, Unanswered, OSError) as error:
            log.warning("the agent did not take back image %s: %s", digest.hex()[:12], error)
            return
        self._mapped.discard(digest)

    async def close(self) -> None:
        """Lets go of the agent."""
        if self._agent is not None:
            await self._agent.close()


def _routes(of_ranks: list[Mapping[str, Any]]) -> fleet_pb2.Routes:
    """The sum; each reason once."""
    summed = {
        f"{route}_{what}": sum(int(rank[route][at]) for rank in of_ranks)
        for route in ("direct", "assembled", "reload")
        for at, what in enumerate(("modules", "bytes"))
    }
    reasons, sources = (
        list(dict.fromkeys(str(line) for rank in of_ranks for line in rank[lines]))[:REASONS_MAX]
        for lines in ("reasons", "sources")
    )
    return fleet_pb2.Routes(**summed, reasons=reasons, sources=sources)


def _plain(memory: agent_service_pb2.DeviceMemory) -> dict[str, Any]:
    """For the ranks, who know no protocol."""
    ranges = [(part.file, part.file_offset, part.memory_offset, part.size_bytes) for part in memory.ranges]
    return {"device": memory.device_uuid, "handle": memory.handle, "seal": memory.seal, "ranges": ranges}
