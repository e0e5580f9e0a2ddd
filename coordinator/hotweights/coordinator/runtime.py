"""The one owner of the state: drains its inbox, steps, saves, adopts, then speaks.

    inbox --> step, step, step --> one write --> adopt --> speak, answer

Nothing is said before it is durable. Reads come from memory. When a write is refused cleanly (disk
full) its askers are told and members' reports wait; when its outcome is unknown the leader stops.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import anyio
import grpc

from hotweights.coordinator import ledger
from hotweights.coordinator.hub import Hub
from hotweights.coordinator.rules import Declined, State, step
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.service.convert import event_message
from hotweights.coordinator.store import Store, StoreBroken, WriteRefused
from hotweights.wire import failpoints
from hotweights.wire.errors import Refused

log = logging.getLogger(__name__)

INBOX_MAX = 65_536
BATCH_MAX = 512
TICK_S = 0.5
# A leader that looks this much later than its ticks come was stopped, or its machine was, or a write took that long.
OVERSLEPT_S = 2.0
STORE_RETRY_S = 1.0
ANSWER_KEPT_S = 86_400.0
RECENT_EVENTS = 100


@dataclass
class Asked:
    """A request that waits for its answer; `answer` is made from the state it led to."""

    answer: Callable[[State], bytes]
    future: "asyncio.Future[bytes]"
    key: str = ""
    manifests: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Item:
    event: e.Event
    asked: Asked | None = None


class Runtime:
    """Start it, put events in, ask for changes, read `state`."""

    def __init__(self, store: Store, limits: Limits, hub: Hub | None = None) -> None:
        self._store = store
        self._limits = limits
        self.hub = hub or Hub()
        self._inbox: asyncio.Queue[Item] = asyncio.Queue(INBOX_MAX)
        self._held_back: deque[Item] = deque()
        self._started = (time.time(), time.monotonic())
        self._grown = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.recent: deque[bytes] = deque(maxlen=RECENT_EVENTS)
        self.cluster_id = ""
        self.revision = 0
        self.state = State(epoch=0, led_at=0.0, limits=limits)
        self.failed: asyncio.Future[None] | None = None

    def now(self) -> float:
        """Wall time that never jumps: a changed clock must not end leases."""
        wall, steady = self._started
        return wall + time.monotonic() - steady

    async def start(self) -> None:
        """Opens the store and begins to lead. Raises StoreError."""
        opened = await self._store.open()
        self.cluster_id, self.revision = opened.cluster_id, opened.last_revision
        try:
            self.state = ledger.restored(opened, self._limits, self.now())
        except ValueError as error:
            raise StoreBroken(f"{self._store.name}: {error}") from error
        await self._recall()
        self.failed = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._lead()), asyncio.create_task(self._tick())]
        for task in self._tasks:
            self.ends_with(task, "the leader")
        log.info("leading cluster %s, epoch %d", self.cluster_id, opened.epoch)

    def ends_with(self, task: "asyncio.Task[None]", what: str) -> None:
        """What a bug ended must not look alive: whoever waits for `failed` then stops the process."""

        def ended(task: "asyncio.Task[None]") -> None:
            assert self.failed is not None
            error = None if task.cancelled() else task.exception()
            if error is not None and not self.failed.done():
                log.critical("%s ended by a bug", what, exc_info=error)
                self.failed.set_exception(error)

        task.add_done_callback(ended)

    async def _recall(self) -> None:
        first = max(1, self.revision - RECENT_EVENTS + 1)
        if self.revision:
            for _, payload in await self._store.events_from(first, RECENT_EVENTS):
                self.recent.append(payload)

    async def end_streams(self) -> None:
        """Tells sessions and watches that the coordinator stops."""
        self._stopping = True
        self.hub.end_all("the coordinator stops")
        async with self._grown:
            self._grown.notify_all()

    async def stop(self) -> None:
        """Ends sessions, tells whoever waits and gives the store back.

        The batch under way may still become durable: its askers hear UNAVAILABLE, the outcome is unknown to them.
        """
        await self.end_streams()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for item in (*self._held_back, *_drain(self._inbox)):
            _refuse(item, _stopping())
        await self._store.close()

    async def put(self, event: e.Event) -> None:
        """Hands in what happened; waits when the inbox is full."""
        await self._inbox.put(Item(event))

    def offer(self, event: e.Event) -> bool:
        """Hands in what may be lost, without waiting; False when the inbox is full."""
        try:
            self._inbox.put_nowait(Item(event))
        except asyncio.QueueFull:
            return False
        return True

    async def ask(
        self,
        event: e.Event,
        answer: Callable[[State], bytes],
        *,
        key: str = "",
        manifests: dict[str, bytes] | None = None,
    ) -> bytes:
        """The answer once the change is durable. Raises Declined, or Refused without the store."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        await self._inbox.put(Item(event, Asked(answer, future, key, manifests or {})))
        return await future

    async def manifest(self, digest: str) -> bytes | None:
        return await self._store.manifest(digest)

    async def events_from(self, revision: int, limit: int) -> list[tuple[int, bytes]]:
        return await self._store.events_from(revision, limit)

    async def grown_past(self, revision: int, timeout_s: float) -> bool:
        """Waits until the log is longer than `revision`; False when it was not in time. Raises Refused at the end."""
        async with self._grown:
            # Not asyncio.wait_for: up to Python 3.11 it loses a cancel that meets the end of the wait.
            with anyio.move_on_after(timeout_s) as scope:
                await self._grown.wait_for(lambda: self.revision > revision or self._stopping)
        if scope.cancelled_caught:
            return False
        if self._stopping:
            raise _stopping()
        return True

    # The loop.

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.put(e.Ticked(self.now()))

    async def _lead(self) -> None:
        looked_at = time.monotonic()
        while True:
            items = await self._next_batch()
            gap_s, looked_at = time.monotonic() - looked_at, time.monotonic()
            if gap_s > TICK_S + OVERSLEPT_S:
                why = "it was stopped or starved of CPU, or its store is slow"
                log.warning("nothing went on here for %.1f s (%s): leases and deadlines begin anew", gap_s, why)
                items.insert(0, Item(e.Ticked(self.now(), gap_s)))
            try:
                await self._work(items)
            except asyncio.CancelledError:
                for item in items:
                    _refuse(item, _stopping())
                raise
            except WriteRefused as error:
                await self._hold_back(items, error)
            except StoreBroken as error:
                log.critical("the store failed, this coordinator stops: %s", error)
                for item in items:
                    _refuse(item, _stopping())
                assert self.failed is not None
                self.failed.set_exception(error)
                return

    async def _next_batch(self) -> list[Item]:
        items = list(self._held_back)
        self._held_back.clear()
        if not items:
            items.append(await self._inbox.get())
        while len(items) < BATCH_MAX and not self._inbox.empty():
            items.append(self._inbox.get_nowait())
        return items

    async def _work(self, items: list[Item]) -> None:
        state, orders, answers = self.state, list[o.Order](), list[tuple[Asked, bytes]]()
        # By request, of this batch: the same request may be sent again while the first is under way.
        fresh: dict[str, bytes] = {}
        manifests: dict[str, bytes] = {}
        refusals: list[tuple[Item, Declined]] = []
        rest: list[Item] = []
        for place, item in enumerate(items, start=1):
            asked = item.asked
            if asked is not None and (kept := await self._kept(asked.key, fresh)) is not None:
                answers.append((asked, kept))
                continue
            try:
                state, said = step(state, item.event)
            except Declined as declined:
                # It may name what this batch brings: it is said with the rest.
                refusals.append((item, declined))
                continue
            orders.extend(said)
            if asked is not None:
                payload = asked.answer(state)
                answers.append((asked, payload))
                manifests.update(asked.manifests)
                if asked.key:
                    fresh[asked.key] = payload
            if any(isinstance(order, o.Tell) and isinstance(order.action, o.Apply) for order in said):
                # What follows could revoke this GO: it is told by the very record that grants it.
                rest = items[place:]
                break
        batch, entries = ledger.changes(self.state, state), self._log_entries(orders)
        used = {version.digest for version in state.versions.values()}
        batch.manifests = {digest: blob for digest, blob in manifests.items() if digest in used}
        batch.events = entries
        until = self.now() + ANSWER_KEPT_S
        batch.answers = {key: (until, payload) for key, payload in fresh.items()}
        if batch:
            failpoints.hit("store.save.before")
            await self._store.write(batch)
            failpoints.hit("store.save.after")
        self.state = state
        self._held_back.extend(rest)
        await self._adopt_log(entries)
        self._speak(orders)
        for item, refusal in refusals:
            _refuse(item, refusal)
        for asked, payload in answers:
            if not asked.future.done():
                asked.future.set_result(payload)

    async def _kept(self, key: str, fresh: dict[str, bytes]) -> bytes | None:
        """What this request was answered before."""
        if not key:
            return None
        return fresh[key] if key in fresh else await self._store.answer(key, self.now())

    def _log_entries(self, orders: list[o.Order]) -> list[tuple[int, bytes]]:
        notes = [order for order in orders if isinstance(order, o.Note)]
        return [
            (revision, event_message(note, revision).SerializeToString())
            for revision, note in enumerate(notes, start=self.revision + 1)
        ]

    async def _adopt_log(self, entries: list[tuple[int, bytes]]) -> None:
        if entries:
            self.recent.extend(payload for _, payload in entries)
            async with self._grown:
                self.revision = entries[-1][0]
                self._grown.notify_all()

    def _speak(self, orders: list[o.Order]) -> None:
        for order in orders:
            match order:
                case o.Tell():
                    self.hub.tell(order, self.state, self.revision)
                case o.Drop():
                    self.hub.drop(order)
                case o.Note():
                    log.info("%s", order.message)

    async def _hold_back(self, items: list[Item], error: WriteRefused) -> None:
        """Askers hear it at once; what members reported is worked in when the store writes again."""
        log.error("the store takes no writes: %s", error)
        refusal = Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "STORE_FULL",
            f"nothing was changed: the coordinator's store takes no writes ({error})",
        )
        for item in items:
            _refuse(item, refusal)
        tick = e.Ticked(0.0)
        waiting = [
            i
            for i in items
            if i.asked is None and not isinstance(i.event, e.CallRefused) and replace(i.event, now=0.0) != tick
        ]
        self._held_back.extend(waiting)
        await asyncio.sleep(STORE_RETRY_S)


def _refuse(item: Item, error: Exception) -> None:
    if item.asked is not None and not item.asked.future.done():
        item.asked.future.set_exception(error)


def _stopping() -> Refused:
    return Refused(grpc.StatusCode.UNAVAILABLE, "STOPPING", "the coordinator stops; try again")


def _drain(inbox: "asyncio.Queue[Item]") -> list[Item]:
    items = []
    while not inbox.empty():
        items.append(inbox.get_nowait())
    return items
