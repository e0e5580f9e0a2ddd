"""Beside one engine: takes the coordinator's orders, has images mapped, opens windows and reports.

    coordinator <-- Session --> ReplicaController --> Engine (pause, ranks, resume)
                                       |
                                       +--> the node's agent (identify, map, release)

Orders are done one at a time, in the order of their arrival; the session hears at once that they were taken.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hotweights.v1 import fleet_pb2, model_pb2, update_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.wire import failpoints
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.window.engine import Engine, EngineFailed
from hotweights.worker_client.window.identify import (
    FAILED,
    Images,
    Processes,
    fingerprint,
    identify_folder,
    meet,
    prove,
)
from hotweights.worker_client.window.messages import FAILURES, mode_of, paused_ms, times_message
from hotweights.worker_client.window.prepare import RELEASE_DEADLINE_S, PrepareRefused, Preparing
from hotweights.worker_client.window.sleep import CALLED_BACK, Sleep
from hotweights.worker_client.window.window import (
    Outcome,
    Unanswered,
    Unproven,
    WindowOrder,
    WindowResult,
    differ,
    run_window,
)

log = logging.getLogger(__name__)

ORDERS_MAX = 8
PREPARE_DEADLINE_S = 600.0


class Stream(Protocol):
    """The session with the coordinator."""

    async def run(self) -> None: ...

    async def close(self) -> None: ...

    def report(self, report: pb.Report) -> None: ...


OpenStream = Callable[
    [Callable[[], pb.Hello], Callable[[pb.Order], Awaitable[str]], Callable[[pb.Welcome], None]], Stream
]


@dataclass(frozen=True)
class Identity:
    """Who the replica is, and what it asks for."""

    replica_id: str
    node_id: str
    model: str = ""
    policy: model_pb2.ModelPolicy = model_pb2.MODEL_POLICY_UNSPECIFIED
    name_map: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kept:
    """What the ranks' copies can bring back."""

    digest: bytes
    version: str
    fingerprints: tuple[bytes, ...]
    folder: Path | None = None


@dataclass
class _Taken:
    order: pb.Order
    arrived: float


class ReplicaController:
    """One replica's life with a coordinator. Use from one event loop only."""

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        connect_agent: Callable[[], Awaitable[Images]],
        open_stream: OpenStream,
        clock: Callable[[], float] = time.monotonic,
        *,
        torn_stays: bool = False,
    ) -> None:
        """`torn_stays`: an engine in doubt is left paused for ever, instead of being ended."""
        self._identity = identity
        self._torn_stays = torn_stays
        self._processes = Processes()
        self._engine = engine
        self._clock = clock
        self._orders: asyncio.Queue[_Taken] = asyncio.Queue(ORDERS_MAX)
        self._sleep = Sleep(engine, self._say, lambda: bool(self.torn), lambda: not self._orders.empty())
        self._stream = open_stream(self._hello, self._on_order, self._welcomed)
        self._preparing = Preparing(engine, connect_agent, identity.replica_id, identity.name_map, clock)
        self._to_check = b""
        self._kept: _Kept | None = None
        self._known: dict[bytes, tuple[bytes, ...]] = {}
        self._last: tuple[tuple[int, int], pb.Report] | None = None
        self._open_window = ""
        self._lost_weights = False
        self._closing = asyncio.Event()
        self.model = identity.model
        self._identified = False
        self.active_digest = b""
        self.active_version = ""
        self.fingerprints: tuple[bytes, ...] = ()
        self.last_window: update_pb2.WindowTimes | None = None
        self.torn = ""

    def status(self) -> dict[str, Any]:
        """What is true now, in plain data."""
        window = self.last_window
        return {
            "replica": self._identity.replica_id,
            "model": self.model,
            "active_version": self.active_version,
            "active_digest": self.active_digest.hex(),
            "fingerprints": [digest.hex() for digest in self.fingerprints],
            "open_window": self._open_window,
            "last_window_ms": None
            if window is None
            else {"quiesce": window.quiesce_ms, "apply": window.apply_ms, "resume": window.resume_ms},
            "torn": self.torn,
        }

    async def run(self) -> None:
        """Follows orders until `close`. Raises what a bug raises."""
        self._processes = await meet(self._engine)
        tasks = [
            asyncio.ensure_future(work)
            for work in (self._stream.run(), self._follow_orders(), self._identify_base(), self._closing.wait())
        ]
        endless = [tasks[0], tasks[1], tasks[3]]
        await asyncio.wait(endless, return_when=asyncio.FIRST_COMPLETED)
        await self._stream.close()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await self._preparing.close()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    def close(self) -> None:
        """Ends `run`; call from its loop. A window that is open is closed by nobody: end the engine afterwards."""
        self._closing.set()

    # Who we are

    def _hello(self) -> pb.Hello:
        node = self._identity.node_id
        replica = pb.ReplicaHello(
            replica_id=self._identity.replica_id,
            model=self._identity.model,
            policy=self._identity.policy,
            active_digest=self.active_digest,
            # One machine so far: a rank's node is the replica's.
            ranks=[fleet_pb2.Rank(index=i, node_id=node, pid=pid) for i, pid in enumerate(self._processes.rank_pids)],
            engine=self._engine.facts.name,
            open_window=self._open_window,
            fingerprints=self.fingerprints,
            identifying=not self._identified and not self.active_digest,
            fingerprint_kind=self._processes.kind,
        )
        return pb.Hello(replica=replica)

    def _welcomed(self, welcome: pb.Welcome) -> None:
        self.model = welcome.model
        if self._sleep.deferred is not None:  # a new leader does not know yet
            self._stream.report(self._sleep.deferred)
        log.info("replica %s follows model %s", self._identity.replica_id, welcome.model)

    async def _identify_base(self) -> None:
        """Finds out what the engine was started on, beside everything else."""
        digest, note = b"", "the engine was not started from a checkpoint folder"
        if self._engine.facts.folder:
            digest, note = await identify_folder(self._preparing.agent, Path(self._engine.facts.folder))
        proof = await fingerprint(self._engine, self._sleep, lambda: bool(self.torn), lambda: bool(self._open_window))
        self._identified = True
        if self.active_digest or self._open_window or self._kept is not None:
            return  # a window was opened meanwhile, and that one knows
        self.active_digest, self.fingerprints = digest, proof
        if digest and proof:
            self._known[digest] = proof
        changed = pb.ActiveChanged(active_digest=digest, fingerprints=proof, note=note)
        self._stream.report(pb.Report(active_changed=changed))

    def _say(self, report: pb.Report) -> None:
        self._stream.report(report)

    # Orders

    async def _on_order(self, order: pb.Order) -> str:
        key = (order.epoch, order.number)
        if self.torn:
            return f"torn: {self.torn}"
        if order.WhichOneof("action") not in ("prepare", "apply", "end"):
            return "a replica takes prepare, apply and end"
        if self._last is not None and self._last[0] == key:
            self._stream.report(self._last[1])
            return ""
        self._sleep.newer_order()
        try:
            self._orders.put_nowait(_Taken(order, self._clock()))
        except asyncio.QueueFull:
            return f"{ORDERS_MAX} orders are waiting already"
        return ""

    async def _follow_orders(self) -> None:
        while not self.torn:
            taken = await self._orders.get()
            order = taken.order
            report = pb.Report(number=order.number, update_id=order.update_id, epoch=order.epoch)
            match order.WhichOneof("action"):
                case "prepare":
                    await self._do_prepare(order.prepare, report)
                case "apply":
                    await self._do_apply(taken, report)
                    failpoints.hit("window.report")
                case _:
                    await self._do_end(order.end.committed)
                    continue
            self._last = (order.epoch, order.number), report
            self._stream.report(report)
        await self._closing.wait()

    async def _do_prepare(self, order: pb.PrepareImage, report: pb.Report) -> None:
        try:
            self._to_check = order.manifest_digest if order.check_finite else b""
            deadline_s, begun = order.deadline_s or PREPARE_DEADLINE_S, self._clock()
            await self._await_upload(order.manifest_digest, deadline_s)
            await self._prepare(order.manifest_digest, deadline_s - (self._clock() - begun))
        except (PrepareRefused, *FAILED) as error:
            log.warning("preparing %s failed: %s", order.manifest_digest.hex()[:12], error)
            report.prepare_failed.reason = str(error)
            return
        report.prepared.manifest_digest = order.manifest_digest
        report.prepared.base_digest = self.active_digest
        held = self._preparing.prepared
        if held is not None and held.digest == order.manifest_digest:
            report.prepared.routes.CopyFrom(held.routes)

    async def _await_upload(self, digest: bytes, deadline_s: float) -> None:
        """Not for an engine that sleeps: it may need the memory when it wakes."""
        async with self._sleep.kept_away() as level:
            pass
        if not level and not self._is_prepared(digest):
            await self._preparing.await_upload(digest, deadline_s)

    def _is_prepared(self, digest: bytes) -> bool:
        return digest == self.active_digest or self._preparing.holds(digest, check_finite=digest == self._to_check)

    async def _prepare(self, digest: bytes, deadline_s: float) -> None:
        """The agent maps, every rank checks. Raises PrepareRefused and what fails outside.

        Asleep, the engine's parameters cannot be read: then all of it is done once it wakes, in its window.
        """
        async with self._sleep.kept_away() as level:
            if level:
                log.info("the engine is asleep at level %d: what was staged is checked when it wakes", level)
                return
            await self._prepare_awake(digest, deadline_s)

    async def _prepare_awake(self, digest: bytes, deadline_s: float) -> None:
        if self._is_prepared(digest):
            return
        check_finite = digest == self._to_check
        folder = await self._preparing.map(digest, deadline_s)
        self._kept = None  # the ranks drop it for this
        async with self._preparing.borrowed(b"" if self._lost_weights else self.active_digest, deadline_s) as base:
            try:
                prepared = await self._preparing.check(
                    digest, folder, deadline_s, check_finite=check_finite, base=base, anew=self._lost_weights
                )
            except (PrepareRefused, HotweightsError, Unanswered):
                # Other ranks may read on: until they have stopped, the engine must not fall asleep.
                await self._preparing.release(self.active_digest, RELEASE_DEADLINE_S)
                raise
        if self.active_digest and not self.fingerprints and not self._lost_weights:
            self.fingerprints = prepared.before

    async def _do_apply(self, taken: _Taken, report: pb.Report) -> None:
        order = taken.order.apply
        failed = report.apply_failed
        try:
            result = await self._apply(taken)
        except (PrepareRefused, *FAILED) as error:
            # Before the pause: nothing was touched.
            failed.failure, failed.reason = pb.APPLY_FAILURE_UNDONE, str(error)
            failed.active_digest = self.active_digest
            return
        window = times_message(result.times, self._clock() - taken.arrived)
        if result.outcome is Outcome.APPLIED:
            report.applied.active_digest = self.active_digest
            report.applied.fingerprints.extend(self.fingerprints)
            report.applied.window.CopyFrom(window)
            report.applied.note = result.note
            self.last_window = window
            log.info("now serving %s; paused %.1f ms", order.version or "the base", paused_ms(window))
            return
        log.warning("window of %s: %s, %s", order.version, result.outcome.value, result.reason)
        if self.torn:
            ended = "The engine stays paused" if self._torn_stays else "The processes of the engine were ended"
            log.error("TORN: %s. %s: it may be half-written. Restart the server.", result.reason, ended)
        failed.failure, failed.reason = FAILURES[result.outcome], result.reason
        failed.active_digest = self.active_digest
        failed.window.CopyFrom(window)

    async def _apply(self, taken: _Taken) -> WindowResult:
        order = taken.order.apply
        target = order.manifest_digest
        if order.restore:
            taken.arrived = self._clock()  # however long it waited behind what it takes back
        if order.restore and self._kept is not None and target in (self._kept.digest, b""):
            return await self._awake(taken, lambda: self._go_back(taken))
        if target == self.active_digest or (order.restore and not target):
            self.active_version = order.version or self.active_version
            return WindowResult(Outcome.APPLIED, fingerprints=self.fingerprints)
        if self._clock() > taken.arrived + order.validity_s:
            return WindowResult(Outcome.EXPIRED, "the order had waited too long behind another")
        return await self._awake(taken, lambda: self._apply_image(taken))

    async def _go_back(self, taken: _Taken) -> WindowResult:
        if self._kept is not None:
            return await self._run(taken, "", self._kept.fingerprints)
        if taken.order.apply.manifest_digest:
            return await self._apply_image(taken)
        raise PrepareRefused("the weights of before are not known, and what was kept of them was slept away")

    async def _apply_image(self, taken: _Taken) -> WindowResult:
        target = taken.order.apply.manifest_digest
        await self._prepare(target, taken.order.apply.apply_deadline_s or PREPARE_DEADLINE_S)
        prepared = self._preparing.prepared
        if prepared is None or prepared.digest != target:
            return WindowResult(Outcome.EXPIRED, "the engine fell asleep again before its window")
        if self._sleep.called_back:
            return WindowResult(Outcome.EXPIRED, CALLED_BACK)
        if self._sleep.deferred is not None or taken.order.apply.restore:
            taken.arrived = self._clock()
        known = self._known.get(target, (b"",) * len(prepared.expected))
        if any(prepared.expected) and differ(prepared.expected, known):
            raise PrepareRefused("what is prepared has another fingerprint than the same version when it was installed")
        expected = tuple(one or other for one, other in zip(prepared.expected, known, strict=True))
        return await self._run(taken, str(prepared.folder), expected)

    async def _awake(self, taken: _Taken, open_window: Callable[[], Awaitable[WindowResult]]) -> WindowResult:
        """The window's result; of an engine that is asleep, opened when its owner wakes it, before anything runs.

        One that was asleep when its image was staged has that still to check, and says so: GO allows no time for it.
        """
        order = taken.order
        level = await self._sleep.level()
        self._lost_weights = level > 1 and self._processes.lose_weights_asleep
        if self._lost_weights:  # what was made ready was for the weights that were there
            self._preparing.prepared = self._kept = None
        ready = order.apply.restore or self._preparing.holds(order.apply.manifest_digest)
        if ready and not level:
            return await open_window()
        self._open_window = order.update_id or "?"  # so that a reconnect is not taken for a lost order
        try:
            if not level:
                self._sleep.defer(order, "was asleep when it was staged; its window opens when that is checked")
            elif reason := await self._sleep.wait_for_wake(order, level):
                return WindowResult(Outcome.EXPIRED, reason)
            taken.arrived = self._clock()
            return await open_window()
        finally:
            self._open_window, self._lost_weights, self._sleep.deferred = "", False, None
            if level and not self.torn:
                await self._sleep.let_wake()

    async def _run(self, taken: _Taken, folder: str, expected: tuple[bytes, ...]) -> WindowResult:
        order, prepared = taken.order.apply, self._preparing.prepared
        before = self.fingerprints if prepared is None else prepared.before
        window = WindowOrder(
            folder=folder,
            version=order.version,
            mode=mode_of(order, clears_caches=not folder or (prepared is not None and prepared.caches_spoilt)),
            begin_by=taken.arrived + order.validity_s,
            quiesce_deadline_s=order.quiesce_deadline_s,
            apply_deadline_s=order.apply_deadline_s,
            version_before=self.active_version,
            expected=expected,
            no_way_back="sleep level 2 had discarded the weights of before" if self._lost_weights else "",
            processes=() if self._torn_stays else self._processes.all,
        )
        self._open_window = taken.order.update_id or "?"
        proof = lambda: prove(self._engine, self._sleep, order.apply_deadline_s)  # noqa: E731
        result = await run_window(self._engine, window, before, proof, self._clock)
        self._open_window = ""
        if result.outcome is Outcome.TORN:
            self.torn = result.reason
        if result.outcome is Outcome.APPLIED:
            self._applied(order, result, before, went_back=not folder)
        return result

    def _applied(self, order: pb.ApplyImage, result: WindowResult, before: tuple[bytes, ...], went_back: bool) -> None:
        if order.restore:  # it was never committed, perhaps because it was written wrong here: it is no measure
            self._known.pop(self.active_digest, None)
        if went_back:
            assert self._kept is not None
            self.active_digest, self._kept = self._kept.digest, None
        else:
            held = self._preparing.prepared
            self._kept = _Kept(self.active_digest, self.active_version, before, held.base if held else None)
            self.active_digest, self._preparing.prepared = order.manifest_digest, None
        self.active_version = order.version
        self.fingerprints = result.fingerprints
        if self.active_digest and result.fingerprints:
            self._known[self.active_digest] = result.fingerprints

    async def _do_end(self, committed: bool) -> None:
        """The way back may go, images that are not served are unmapped and released.

        After a commit the ranks keep it all the same, where they have memory to spare: a rollback may be asked for.
        """
        retain = self._kept.folder if self._kept is not None and committed else None
        try:
            self._kept = None
            await self._preparing.release(self.active_digest, RELEASE_DEADLINE_S, retain)
        except (Unanswered, EngineFailed, Unproven) as error:
            log.warning("the ranks could not let go of the update: %s", error)
