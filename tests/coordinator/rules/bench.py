"""A small fleet on a bench: events in, orders out, members that obey when told to."""

from typing import Any, TypeVar

from hotweights.coordinator import ledger
from hotweights.coordinator.rules import Declined, Order, State, step
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import (
    Kind,
    Options,
    Outcome,
    Phase,
    Policy,
    ReplicaRecord,
    UpdateRecord,
    WindowTimes,
)
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.store import Opened

T = TypeVar("T")
MODEL = "m"
WINDOW = WindowTimes(1.0, 2.0, 0.5, 4.0)


class Bench:
    """Agents hold what they stage; replicas serve what they apply. Nobody acts before they are told to."""

    def __init__(self, limits: Limits | None = None, now: float = 1000.0) -> None:
        self.limits = limits or Limits()
        self.now = now
        self.state = State(epoch=1, led_at=now, limits=self.limits)
        self.notes: list[o.Note] = []
        self.drops: list[o.Drop] = []
        # Orders that nobody has answered, in the order they were told.
        self.orders: list[o.Tell] = []
        self.told: list[o.Tell] = []
        self.active: dict[str, str] = {}
        self.sessions: dict[str, str] = {}
        self.lives: dict[str, int] = {}
        self.held: dict[str, set[str]] = {}
        self.homes: dict[str, str] = {}
        # What replicas say of what they have installed: by replica, and by replica and digest.
        self.kinds: dict[str, str] = {}
        self.fingerprints: dict[tuple[str, str], tuple[str, ...]] = {}
        self.rank_count = 1
        self._records: dict[str, bytes] = {}
        self._count = 0

    # Events.

    def do(self, event: e.Event) -> tuple[Order, ...]:
        before = self.state
        self.state, said = step(before, event)
        batch = ledger.changes(before, self.state)
        self._records.update(batch.puts)
        for key in batch.deletes:
            self._records.pop(key, None)
        for order in said:
            match order:
                case o.Tell():
                    self.told.append(order)
                    self.orders.append(order)
                case o.Note():
                    self.notes.append(order)
                case o.Drop():
                    self.drops.append(order)
        return said

    def declined(self, event: e.Event) -> Declined:
        """The refusal of an event, which changed nothing."""
        try:
            step(self.state, event)
        except Declined as refusal:
            return refusal
        raise AssertionError(f"{event} was not declined")

    def wait(self, seconds: float, *, every: float = 5.0, beating: bool = True) -> None:
        """Time passes; whoever is connected says so, unless all are silent."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + every)
            if beating:
                for member in list(self.sessions):
                    self.do(e.Beat(self.now, member, self.sessions[member]))
            self.do(e.Ticked(self.now))

    def agent(self, node: str, *held: str, life: int | None = None) -> None:
        self._count += 1
        session = f"s{self._count}-{node}"
        self.lives[node] = self.lives.get(node, 0) if life is None else life
        self.held[node] = set(held)
        self.do(e.AgentAttached(self.now, node, session, f"life{self.lives[node]}", f"tcp://{node}:1", frozenset(held)))
        self.sessions[node] = session

    def replica(
        self,
        name: str,
        node: str = "n1",
        active: str | None = None,
        *,
        model: str = MODEL,
        policy: Policy | None = None,
        identifying: bool = False,
        open_window: str = "",
        new_life: bool = False,
    ) -> None:
        """Attaches, for the first time or again."""
        self._count += 1
        session = f"s{self._count}-{name}"
        self.lives[name] = self.lives.get(name, 0) + new_life
        if active is not None:
            self.active[name] = active
        self.homes[name] = node
        serves = self.active.setdefault(name, "")
        self.orders = [order for order in self.orders if order.member != name]
        self.do(
            e.ReplicaAttached(
                now=self.now,
                replica=name,
                session=session,
                incarnation=f"life{self.lives[name]}",
                model=model,
                policy=policy,
                ranks=tuple((i, node, 100 + i) for i in range(self.rank_count)),
                active=serves,
                fingerprints=self.fingerprints.get((name, serves), ()),
                fingerprint_kind=self.kinds.get(name, ""),
                identifying=identifying,
                open_window=open_window,
            )
        )
        self.sessions[name] = session

    def leaves(self, name: str) -> None:
        """Its stream ends, and the orders on it are lost."""
        self.do(e.Left(self.now, name, self.sessions.pop(name)))
        self.orders = [order for order in self.orders if order.member != name]

    def publish(self, name: str, digest: str, **more: Any) -> None:
        self.do(e.VersionPublished(self.now, MODEL, name, digest, 1_000_000, 10, 4, **more))

    def start(self, version: str = "", kind: Kind = Kind.FLEET, **options: Any) -> UpdateRecord:
        self.do(e.UpdateAsked(self.now, MODEL, version, Options(**options), kind))
        return self.update

    def cancel(self, update: str) -> None:
        self.do(e.CancelAsked(self.now, update))

    # What members do.

    def waiting(self, kind: type[T], member: str = "") -> list[tuple[o.Tell, T]]:
        """Orders of one kind that are not answered yet."""
        return [
            (order, order.action)
            for order in self.orders
            if isinstance(order.action, kind) and member in ("", order.member)
        ]

    def take(self, kind: type[T], member: str = "") -> tuple[o.Tell, T]:
        order, action = self.waiting(kind, member)[0]
        self.orders.remove(order)
        return order, action

    def who(self, member: str) -> tuple[float, str, str]:
        return self.now, member, self.sessions[member]

    def stage(self, node: str) -> None:
        order, stage = self.take(o.Stage, node)
        self.held[node].add(stage.digest)
        self.do(e.Staged(*self.who(node), order.update, stage.digest))

    def stage_all(self) -> None:
        while self.waiting(o.Stage):
            self.stage(self.waiting(o.Stage)[0][0].member)

    def prepare(self, replica: str) -> None:
        order, _ = self.take(o.Prepare, replica)
        self.do(e.Prepared(*self.who(replica), order.update, order.ticket, self.active[replica]))

    def prepare_all(self) -> None:
        self.stage_all()
        while self.waiting(o.Prepare):
            self.prepare(self.waiting(o.Prepare)[0][0].member)
            self.stage_all()

    def apply(self, replica: str) -> o.Apply:
        """Opens its window and reports; the digest it was given is what it serves."""
        order, go = self.take(o.Apply, replica)
        self.active[replica] = go.digest
        proof = self.fingerprints.get((replica, go.digest), ())
        self.do(e.Applied(*self.who(replica), order.update, order.ticket, go.digest, WINDOW, proof))
        return go

    def defer(self, replica: str) -> None:
        """It is asleep: takes GO, and does it when it wakes."""
        order = self.waiting(o.Apply, replica)[0][0]
        self.do(e.Deferred(*self.who(replica), order.update, order.ticket, "asleep at level 1"))

    def fail(self, replica: str, reason: str = "shapes differ", *, torn: bool = False) -> None:
        order, _ = self.take(o.Apply, replica)
        self.do(e.ApplyFailed(*self.who(replica), order.update, order.ticket, reason, self.active[replica], torn=torn))

    def going(self) -> list[str]:
        """Who has an Apply order that is not answered."""
        return [order.member for order, _ in self.waiting(o.Apply)]

    def obey(self, *except_for: str) -> None:
        """Everyone does as told until nothing is left to do."""
        for _ in range(1000):
            mine = [
                order
                for order in self.orders
                if order.member not in except_for and isinstance(order.action, o.Stage | o.Prepare | o.Apply)
            ]
            if not mine:
                return
            match mine[0].action:
                case o.Stage():
                    self.stage(mine[0].member)
                case o.Prepare():
                    self.prepare(mine[0].member)
                case o.Apply():
                    self.apply(mine[0].member)
        raise AssertionError("the fleet never comes to rest")

    # Looking.

    @property
    def update(self) -> UpdateRecord:
        """The newest update of the fleet."""
        fleet = [u for u in self.state.updates.values() if u.kind is not Kind.CATCH_UP]
        return max(fleet, key=lambda u: int(u.id.rpartition(".")[2]))

    def phase(self) -> Phase:
        """Its phase: a call, since a checker takes a property that was looked at once for settled."""
        return self.update.phase

    @property
    def catch_ups(self) -> list[UpdateRecord]:
        return [u for u in self.state.updates.values() if u.kind is Kind.CATCH_UP]

    @property
    def committed(self) -> str:
        return self.state.models[MODEL].committed

    def record(self, replica: str) -> ReplicaRecord:
        return self.state.replicas[replica]

    def outcomes(self, update: UpdateRecord | None = None) -> dict[str, Outcome]:
        members = (update or self.update).members
        return {name: member.outcome for name, member in members.items()}

    # Another leader.

    def lead_anew(self, *, attached: bool = True) -> None:
        """The coordinator restarts: only what was written is left, and everyone says Hello."""
        opened = Opened("cluster", self.state.epoch + 1, dict(self._records), 0)
        self.state = ledger.restored(opened, self.limits, self.now)
        self.orders = []
        members, self.sessions = list(self.sessions), {}
        if not attached:
            return
        for name in members:
            if name in self.held:
                self.agent(name, *self.held[name])
            else:
                self.replica(name, self.homes[name])
