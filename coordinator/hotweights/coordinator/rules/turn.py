"""A turn: the state while one event is worked in. Copies a table only when it changes."""

from collections.abc import ItemsView, Mapping, ValuesView
from dataclasses import replace
from typing import Generic, TypeVar

from hotweights.coordinator.rules.orders import Action, Drop, Note, NoteKind, Order, Refusal, Tell
from hotweights.coordinator.rules.records import (
    Kind,
    Member,
    ModelRecord,
    ReplicaRecord,
    Ticket,
    UpdateRecord,
    VersionRecord,
    WindowTimes,
)
from hotweights.coordinator.rules.state import Effort, Node, Seat, State

K = TypeVar("K")
V = TypeVar("V")


class Table(Generic[K, V]):
    """A mapping that is copied at its first change; the original stays as it was."""

    def __init__(self, base: Mapping[K, V]) -> None:
        self._now: Mapping[K, V] = base
        self._own: dict[K, V] | None = None

    def put(self, key: K, value: V) -> None:
        self._writable()[key] = value

    def drop(self, key: K) -> None:
        self._writable().pop(key, None)

    def _writable(self) -> dict[K, V]:
        if self._own is None:
            self._own = dict(self._now)
            self._now = self._own
        return self._own

    def __getitem__(self, key: K) -> V:
        return self._now[key]

    def __contains__(self, key: K) -> bool:
        return key in self._now

    def get(self, key: K) -> V | None:
        return self._now.get(key)

    def values(self) -> ValuesView[V]:
        return self._now.values()

    def items(self) -> ItemsView[K, V]:
        return self._now.items()

    def done(self) -> Mapping[K, V]:
        return self._now


class Turn:
    """Tables to read and change, and the orders that follow."""

    def __init__(self, state: State, now: float) -> None:
        self.now = now
        self.limits = state.limits
        self.led_at = state.led_at
        self.epoch = state.epoch
        self.models: Table[str, ModelRecord] = Table(state.models)
        self.versions: Table[tuple[str, str], VersionRecord] = Table(state.versions)
        self.updates: Table[str, UpdateRecord] = Table(state.updates)
        self.replicas: Table[str, ReplicaRecord] = Table(state.replicas)
        self.seats: Table[str, Seat] = Table(state.seats)
        self.nodes: Table[str, Node] = Table(state.nodes)
        self.efforts: Table[str, Effort] = Table(state.efforts)
        self._state = state
        self._number = state.next_number
        self._orders: list[Order] = []
        self.touched: set[str] = set()

    def done(self) -> tuple[State, tuple[Order, ...]]:
        after = replace(
            self._state,
            models=self.models.done(),
            versions=self.versions.done(),
            updates=self.updates.done(),
            replicas=self.replicas.done(),
            seats=self.seats.done(),
            nodes=self.nodes.done(),
            efforts=self.efforts.done(),
            next_number=self._number,
            led_at=self.led_at,
        )
        return after, tuple(self._orders)

    # Orders.

    def tell(self, to: Seat | Node, action: Action, update: str = "") -> Ticket:
        ticket = Ticket(self.epoch, self._number)
        self._number += 1
        self._orders.append(Tell(to.session, to.id, ticket, update, action))
        return ticket

    def end_session(self, session: str, reason: str) -> None:
        self._orders.append(Drop(session, reason))

    def note(
        self,
        kind: NoteKind,
        message: str,
        *,
        model: str = "",
        version: str = "",
        update: str = "",
        replica: str = "",
        node: str = "",
        window: WindowTimes | None = None,
    ) -> None:
        self._orders.append(Note(self.now, kind, message, model, version, update, replica, node, window))

    def note_update(
        self,
        kind: NoteKind,
        update: UpdateRecord,
        message: str,
        *,
        replica: str = "",
        window: WindowTimes | None = None,
    ) -> None:
        self.note(
            kind,
            message,
            model=update.model,
            version=update.target,
            update=update.id,
            replica=replica,
            window=window,
        )

    def note_refusal(self, refusal: Refusal, node: str) -> None:
        named = f" ({refusal.role} {refusal.name})" if refusal.name else ""
        more = f"; {refusal.passed_over} more refusals before it were not written down" if refusal.passed_over else ""
        message = f"{refusal.peer}{named}: {refusal.method} refused, {refusal.reason}{more}"
        self._orders.append(Note(self.now, NoteKind.CALL_REFUSED, message, node=node, refusal=refusal))

    # Reading.

    def touch(self, model: str) -> None:
        """The model's updates and policy are looked at when the turn ends."""
        self.touched.add(model)

    def open_updates(self, model: str) -> list[UpdateRecord]:
        return [u for u in self.updates.values() if u.model == model and u.phase.is_open]

    def open_fleet_update(self, model: str) -> UpdateRecord | None:
        for update in self.open_updates(model):
            if update.kind is not Kind.CATCH_UP:
                return update
        return None

    def digest_of(self, model: str, version: str) -> str:
        record = self.versions.get((model, version)) if version else None
        return record.digest if record else ""

    def version_of(self, model: str, digest: str) -> str:
        """The version with this content: the committed one, else the newest; empty when there is none."""
        if not digest:
            return ""
        named = self.models.get(model)
        if named is not None and self.digest_of(model, named.committed) == digest:
            return named.committed
        same = [v for v in self.versions.values() if v.model == model and v.digest == digest]
        return max(same, key=lambda v: v.sequence).name if same else ""

    def holders(self, digest: str) -> list[Node]:
        """Who can be asked for it."""
        return [n for n in self.nodes.values() if n.connected and digest in n.held and not n.quarantine]

    def seat_lost(self, model: str, replica: str) -> bool:
        """Out of contact for a whole lease, or gone to another model; a new leader waits a full term for everyone."""
        seat = self.seats.get(replica)
        if seat is None:
            return self.now >= self.led_at + self.limits.lease_s
        if seat.model != model:
            return True
        return not seat.connected and self.now >= seat.lease_until

    def node_lost(self, node_id: str, since: float) -> bool:
        """Without an agent for a whole lease; one never seen has a lease from `since` on to attach."""
        node = self.nodes.get(node_id)
        if node is None:
            return self.now >= max(self.led_at, since) + self.limits.lease_s
        return not node.connected and self.now >= node.lease_until

    # Changing.

    def put_update(self, update: UpdateRecord) -> UpdateRecord:
        self.updates.put(update.id, update)
        return update

    def put_member(self, update_id: str, member: Member) -> UpdateRecord:
        update = self.updates[update_id]
        return self.put_update(replace(update, members={**update.members, member.replica: member}))

    def record_of(self, model: str, replica: str) -> ReplicaRecord | None:
        """The replica's record, unless it follows another model by now or was forgotten."""
        record = self.replicas.get(replica)
        return record if record is not None and record.model == model else None

    def desire(self, model: str, replica: str, digest: str) -> None:
        record = self.record_of(model, replica)
        if record is not None and record.desired != digest:
            self.replicas.put(replica, replace(record, desired=digest))
