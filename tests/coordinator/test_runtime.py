"""The runtime: saved before adopted, adopted before spoken; and what it does when the store does not write."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from hotweights.coordinator import runtime as runtime_module
from hotweights.coordinator.hub import Hub, Outlet
from hotweights.coordinator.rules import Declined, State
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Options, Phase, ReplicaRecord, Ticket
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.store import Batch, StoreBroken, WriteRefused
from hotweights.coordinator.store.codec import decode
from hotweights.coordinator.store.memory import MemoryStore
from hotweights.v1 import worker_service_pb2
from hotweights.wire.errors import Refused

D1, D2 = "11" * 32, "22" * 32
DEADLINE_S = 5.0


class SlowStore(MemoryStore):
    """Writes when its gate is open; refuses or breaks when told to."""

    def __init__(self) -> None:
        super().__init__(1000)
        self.gate = asyncio.Event()
        self.gate.set()
        self.trouble: Exception | None = None
        self.tried = 0

    async def write(self, batch: Batch) -> None:
        self.tried += 1
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        await super().write(batch)

    def desired(self, replica: str) -> str:
        return decode(ReplicaRecord, self._records[f"replica {replica}"]).desired


class WatchedHub(Hub):
    """Notes what was durable when each order was told."""

    def __init__(self, store: SlowStore) -> None:
        super().__init__()
        self._store = store
        self.gos: list[tuple[o.Apply, str]] = []

    def tell(self, tell: o.Tell, state: State, revision: int) -> None:
        if isinstance(tell.action, o.Apply):
            self.gos.append((tell.action, self._store.desired(tell.member)))
        super().tell(tell, state, revision)


@dataclass
class Plant:
    """A runtime with one agent `n` that holds all, one replica `r`, and their outlets."""

    store: SlowStore
    hub: WatchedHub
    runtime: Runtime
    outlets: dict[str, Outlet] = field(default_factory=dict)

    def now(self) -> float:
        return self.runtime.now()

    async def ask(self, event: e.Event, key: str = "") -> bytes:
        return await asyncio.wait_for(
            self.runtime.ask(event, lambda state: str(len(state.updates)).encode(), key=key), DEADLINE_S
        )

    async def attach(self) -> None:
        for member in ("n", "r"):
            self.outlets[member] = self.hub.open(f"s-{member}")
        await self.ask(e.AgentAttached(self.now(), "n", "s-n", "i", "", frozenset({D1, D2})))
        await self.ask(e.VersionPublished(self.now(), "m", "v1", D1, 1, 1, 1))
        await self.ask(e.VersionPublished(self.now(), "m", "v2", D2, 1, 1, 1))
        await self.ask(e.ReplicaAttached(self.now(), "r", "s-r", "i", "m", None, ((0, "n", 1),), D1))

    def start(self) -> e.UpdateAsked:
        return e.UpdateAsked(self.now(), "m", "v2", Options())

    async def told(self, member: str, action: str) -> worker_service_pb2.Order:
        """The next order of that kind; others before it are skipped."""
        while True:
            order = await asyncio.wait_for(self.outlets[member].queue.get(), DEADLINE_S)
            if order.WhichOneof("action") == action:
                return order

    async def stage(self) -> None:
        for _ in range(2):
            order = await self.told("n", "stage")
            digest = order.stage.manifest_digest.hex()
            await self.runtime.put(e.Staged(self.now(), "n", "s-n", order.update_id, digest))

    async def prepared(self) -> e.Prepared:
        await self.stage()
        order = await self.told("r", "prepare")
        ticket = Ticket(order.epoch, order.number)
        return e.Prepared(self.now(), "r", "s-r", order.update_id, ticket, D1)


@pytest.fixture
async def plant(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plant]:
    monkeypatch.setattr(runtime_module, "STORE_RETRY_S", 0.01)
    # No ticks: what happens is only what the test does.
    monkeypatch.setattr(runtime_module, "TICK_S", 3600.0)
    store = SlowStore()
    hub = WatchedHub(store)
    runtime = Runtime(store, Limits(), hub)
    await runtime.start()
    plant = Plant(store, hub, runtime)
    await plant.attach()
    yield plant
    store.gate.set()
    await runtime.stop()
    if runtime.failed is not None and runtime.failed.done():
        runtime.failed.exception()


async def until(holds: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not holds():  # noqa: ASYNC110 - what is looked at has no event of its own
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), DEADLINE_S)


def drained(outlet: Outlet) -> int:
    count = outlet.queue.qsize()
    while not outlet.queue.empty():
        outlet.queue.get_nowait()
    return count


async def test_nothing_is_said_adopted_or_answered_before_it_is_durable(plant: Plant) -> None:
    drained(plant.outlets["n"])
    before, revision, tried = plant.runtime.state, plant.runtime.revision, plant.store.tried
    plant.store.gate.clear()
    asking = asyncio.create_task(plant.ask(plant.start()))
    await until(lambda: plant.store.tried > tried)
    await asyncio.sleep(0.02)
    assert plant.outlets["n"].queue.empty()
    assert plant.runtime.state is before
    assert plant.runtime.revision == revision
    assert not asking.done()
    plant.store.gate.set()
    assert await asking == b"1"
    assert (await plant.told("n", "stage")).update_id == "m.1"
    assert plant.runtime.state.updates["m.1"].phase is Phase.STAGING


async def test_events_are_not_watched_before_they_are_durable(plant: Plant) -> None:
    at = plant.runtime.revision
    plant.store.gate.clear()
    asking = asyncio.create_task(plant.ask(plant.start()))
    assert not await plant.runtime.grown_past(at, 0.05)
    plant.store.gate.set()
    assert await plant.runtime.grown_past(at, DEADLINE_S)
    await asking
    assert [revision for revision, _ in await plant.runtime.events_from(at + 1, 9)] == [at + 1]


async def test_a_refused_write_changes_nothing_and_its_asker_is_told(plant: Plant) -> None:
    drained(plant.outlets["n"])
    before = plant.runtime.state
    plant.store.trouble = WriteRefused("disk full")
    with pytest.raises(Refused) as caught:
        await plant.ask(plant.start())
    assert caught.value.reason == "STORE_FULL"
    assert "nothing was changed" in caught.value.message
    assert plant.runtime.state is before
    assert plant.outlets["n"].queue.empty()
    plant.store.trouble = None
    assert await plant.ask(plant.start()) == b"1"


async def test_what_members_reported_meanwhile_is_worked_in_when_the_store_writes_again(plant: Plant) -> None:
    await plant.ask(plant.start())
    prepared = await plant.prepared()
    plant.store.trouble, tried = WriteRefused("disk full"), plant.store.tried
    await plant.runtime.put(prepared)
    await until(lambda: plant.store.tried > tried + 2)
    assert not plant.hub.gos
    plant.store.trouble = None
    assert (await plant.told("r", "apply")).apply.manifest_digest.hex() == D2
    assert len(plant.hub.gos) == 1


async def test_a_write_of_unknown_outcome_stops_the_leader(plant: Plant) -> None:
    drained(plant.outlets["n"])
    plant.store.trouble = StoreBroken("the disk is gone")
    with pytest.raises(Refused) as caught:
        await plant.ask(plant.start())
    assert caught.value.reason == "STOPPING"
    assert plant.runtime.failed is not None
    with pytest.raises(StoreBroken, match="the disk is gone"):
        await asyncio.wait_for(asyncio.shield(plant.runtime.failed), DEADLINE_S)
    assert plant.outlets["n"].queue.empty()


async def test_a_bug_in_a_rule_stops_the_leader_and_not_only_its_task(plant: Plant) -> None:
    await plant.runtime.put(e.Event(plant.now()))
    assert plant.runtime.failed is not None
    with pytest.raises(TypeError, match="no rule for Event"):
        await asyncio.wait_for(asyncio.shield(plant.runtime.failed), DEADLINE_S)


async def test_every_go_is_told_by_the_record_that_grants_it(plant: Plant) -> None:
    """A cancel that lies in the inbox behind the last report must not revoke a GO in one write with it."""
    await plant.ask(plant.start())
    prepared = await plant.prepared()
    plant.store.gate.clear()
    # Something to write holds the leader while both arrive.
    first = asyncio.create_task(plant.ask(e.VersionPublished(plant.now(), "m", "v3", D1, 1, 1, 1)))
    await asyncio.sleep(0.01)
    await plant.runtime.put(prepared)
    cancel = asyncio.create_task(plant.ask(e.CancelAsked(plant.now(), "m.1")))
    await asyncio.sleep(0.01)
    plant.store.gate.set()
    await asyncio.gather(first, cancel)
    assert [(go.digest, go.restore, durable) for go, durable in plant.hub.gos] == [(D2, False, D2)]
    assert plant.runtime.state.updates["m.1"].phase is Phase.ROLLING_BACK


async def test_the_same_request_gets_the_same_answer(plant: Plant) -> None:
    first = await plant.ask(plant.start(), key="request 1")
    assert await plant.ask(plant.start(), key="request 1") == first
    with pytest.raises(Declined, match="is open"):
        await plant.ask(plant.start(), key="request 2")


async def test_a_request_sent_again_while_the_first_is_under_way_gets_its_answer(plant: Plant) -> None:
    """A client whose deadline passed sends it again; the first may be in the very same batch."""
    plant.store.gate.clear()
    held = asyncio.create_task(plant.ask(e.VersionPublished(plant.now(), "m", "v3", D1, 1, 1, 1)))
    await asyncio.sleep(0.01)
    twice: list[Awaitable[bytes]] = [asyncio.create_task(plant.ask(plant.start(), key="request 1")) for _ in range(2)]
    await asyncio.sleep(0.01)
    plant.store.gate.set()
    await held
    assert await asyncio.gather(*twice) == [b"1", b"1"]
    assert len(plant.runtime.state.updates) == 1


async def test_a_declined_request_is_answered_anew(plant: Plant) -> None:
    await plant.ask(plant.start())
    with pytest.raises(Declined, match="is open"):
        await plant.ask(plant.start(), key="request 1")
    await plant.ask(e.CancelAsked(plant.now(), "m.1"))
    assert await plant.ask(plant.start(), key="request 1") == b"2"


async def test_a_batch_that_changes_nothing_writes_nothing(plant: Plant) -> None:
    tried = plant.store.tried
    for _ in range(20):
        await plant.runtime.put(e.Beat(plant.now(), "r", "s-r"))
    with pytest.raises(Declined, match="no update"):
        await plant.ask(e.CancelAsked(plant.now(), "m.99"))
    assert plant.store.tried == tried


async def test_a_refusal_names_nothing_that_is_not_durable(plant: Plant) -> None:
    plant.store.gate.clear()
    first = asyncio.create_task(plant.ask(e.VersionPublished(plant.now(), "m", "v3", D1, 1, 1, 1)))
    await asyncio.sleep(0.01)
    twice = [asyncio.create_task(plant.ask(plant.start())) for _ in range(2)]
    await asyncio.sleep(0.01)
    plant.store.trouble = WriteRefused("disk full")
    plant.store.gate.set()
    for task in (first, *twice):
        with pytest.raises(Refused, match="nothing was changed"):
            await task
    assert not plant.runtime.state.updates


async def test_a_leader_notices_that_it_did_not_run(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    led_at = plant.runtime.state.led_at
    await plant.ask(plant.start())
    assert plant.runtime.state.led_at == led_at
    monkeypatch.setattr(runtime_module, "TICK_S", 0.0)
    monkeypatch.setattr(runtime_module, "OVERSLEPT_S", 0.1)
    await asyncio.sleep(0.2)
    await plant.runtime.put(e.Beat(plant.now(), "r", "s-r"))
    await until(lambda: plant.runtime.state.led_at > led_at)
    assert plant.runtime.state.nodes["n"].lease_until >= plant.runtime.state.led_at + Limits().lease_s


async def test_stopping_refuses_whoever_waits(plant: Plant) -> None:
    plant.store.gate.clear()
    asking = [asyncio.create_task(plant.ask(plant.start())) for _ in range(2)]
    await asyncio.sleep(0.01)
    later = asyncio.create_task(plant.ask(plant.start()))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(plant.runtime.stop(), DEADLINE_S)
    done, _ = await asyncio.wait({*asking, later}, timeout=DEADLINE_S / 5)
    assert len(done) == 3
    for task in done:
        with pytest.raises(Refused) as caught:
            await task
        assert caught.value.reason == "STOPPING"
    assert plant.outlets["r"].ended.is_set()


async def test_a_slow_reader_is_told_to_come_again_and_not_buffered_without_bound(plant: Plant) -> None:
    outlet = plant.outlets["r"]
    tell = o.Tell("s-r", "r", Ticket(1, 1), "", o.End(committed=True))
    for _ in range(5000):
        plant.hub.tell(tell, plant.runtime.state, 1)
    assert outlet.ended.is_set()
    assert "too slow" in outlet.reason
    assert outlet.queue.qsize() <= 256


async def test_a_new_runtime_on_the_same_store_leads_with_the_next_epoch_and_the_same_records(plant: Plant) -> None:
    await plant.ask(plant.start())
    records = plant.runtime.state.updates
    again = Runtime(plant.store, Limits())
    await again.start()
    assert again.state.epoch == plant.runtime.state.epoch + 1
    assert (again.cluster_id, again.revision) == (plant.runtime.cluster_id, plant.runtime.revision)
    assert again.state.updates == records
    assert list(again.recent) == list(plant.runtime.recent)
    await again.stop()


async def test_records_that_cannot_be_read_are_one_clear_error() -> None:
    store = SlowStore()
    await store.write(Batch(puts={"model m": b"{"}))
    with pytest.raises(StoreBroken, match=r"memory:.*no ModelRecord"):
        await Runtime(store, Limits()).start()
