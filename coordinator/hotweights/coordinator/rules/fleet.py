"""Who is there: members attach, are heard from, fall silent and leave."""

from dataclasses import replace

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.catalogue import check_name
from hotweights.coordinator.rules.orders import Declined, NoteKind
from hotweights.coordinator.rules.records import (
    Member,
    ModelRecord,
    Outcome,
    ReplicaRecord,
    UpdateRecord,
)
from hotweights.coordinator.rules.state import Node, Seat
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.update import fail_member
from hotweights.coordinator.rules.windows import effort_of


def agent_attached(turn: Turn, event: e.AgentAttached) -> None:
    check_name("node", event.node)
    present = turn.nodes.get(event.node)
    _same_life(turn, "node", event.node, present, event.incarnation)
    node = Node(
        id=event.node,
        session=event.session,
        incarnation=event.incarnation,
        endpoint=event.endpoint,
        held=event.held,
        lease_until=turn.now + turn.limits.lease_s,
        token_key=event.token_key,
        bytes_used=event.bytes_used,
        bytes_free=event.bytes_free,
        zone=event.zone,
        accusers=present.accusers if present and present.incarnation == event.incarnation else frozenset(),
    )
    turn.nodes.put(event.node, node)
    if present is None or not present.connected:
        turn.note(NoteKind.NODE_ATTACHED, f"node {event.node} is here", node=event.node)
    note_available(turn)
    for update in [u for u in turn.updates.values() if u.phase.is_open]:
        _forget_asked(turn, update, event.node)
        turn.touch(update.model)
    for model in _models_of(turn, event.held):
        turn.touch(model)


def replica_attached(turn: Turn, event: e.ReplicaAttached) -> None:
    check_name("replica", event.replica)
    for _, node, _ in event.ranks:
        check_name("node", node)
    if event.model:
        check_name("model", event.model)
    present = turn.seats.get(event.replica)
    _same_life(turn, "replica", event.replica, present, event.incarnation)
    model = _model_for(turn, event)
    same_life = present if present and present.incarnation == event.incarnation else None
    seat = Seat(
        id=event.replica,
        model=model,
        session=event.session,
        incarnation=event.incarnation,
        nodes=tuple(dict.fromkeys(node for _, node, _ in event.ranks)),
        ranks=event.ranks,
        active=event.active,
        identifying=event.identifying,
        open_window=event.open_window,
        engine=event.engine,
        lease_until=turn.now + turn.limits.lease_s,
        fingerprints=event.fingerprints,
        fingerprint_kind=event.fingerprint_kind,
        window=same_life.window if same_life else None,
        routes=same_life.routes if same_life else None,
        heard=same_life.heard if same_life else None,
    )
    turn.seats.put(event.replica, seat)
    record = turn.replicas.get(event.replica)
    if record is not None and record.model != model:
        turn.touch(record.model)
    if record is None or record.model != model:
        committed = turn.digest_of(model, turn.models[model].committed)
        turn.replicas.put(event.replica, ReplicaRecord(event.replica, model, desired=committed))
    if present is None or not present.connected:
        turn.note(
            NoteKind.REPLICA_ATTACHED,
            f"replica {event.replica} follows {model}",
            model=model,
            replica=event.replica,
        )
    _compare(turn, seat, new_life=same_life is None)
    turn.touch(model)


def _same_life(turn: Turn, what: str, name: str, present: Seat | Node | None, incarnation: str) -> None:
    """The same incarnation replaces its older stream; another live one is declined."""
    if present is None or not present.connected:
        return
    if present.incarnation != incarnation:
        raise Declined(
            "ALREADY_EXISTS",
            "MEMBER_EXISTS",
            f"another live process is {what} {name}; give this one another name",
            member=name,
        )
    turn.end_session(present.session, "replaced by a newer stream of the same process")


def _model_for(turn: Turn, event: e.ReplicaAttached) -> str:
    """The model named, or the only one there is."""
    names = sorted(model.name for model in turn.models.values())
    if not event.model and len(names) != 1:
        known = ", ".join(names) or "none yet"
        raise Declined(
            "FAILED_PRECONDITION",
            "MODEL_UNCLEAR",
            f"name the model to follow (HOTWEIGHTS_MODEL); the coordinator has: {known}",
            models=known,
        )
    name = event.model or names[0]
    model = turn.models.get(name) or ModelRecord(name)
    if model.policy is None and event.policy is not None:
        model = replace(model, policy=event.policy)
        turn.note(NoteKind.MODEL_POLICY, f"{name}: policy {event.policy.value}", model=name)
    if turn.models.get(name) != model:
        turn.models.put(name, model)
    return name


def _compare(turn: Turn, seat: Seat, *, new_life: bool) -> None:
    """What the replica says of itself against what open updates expect of it."""
    for update in turn.open_updates(seat.model):
        member = update.members.get(seat.id)
        if member is None:
            continue
        effort = turn.efforts.get(update.id)
        if effort is not None and seat.id in effort.preparing:
            preparing = {k: v for k, v in effort.preparing.items() if k != seat.id}
            turn.efforts.put(update.id, replace(effort, preparing=preparing))
        if member.outcome is Outcome.PREPARED:
            turn.put_member(update.id, replace(member, outcome=Outcome.STAGING))
        elif member.outcome is Outcome.RESTORING and seat.open_window != update.id:
            # The order may have been lost with the stream; going back is asked again.
            turn.put_member(update.id, replace(member, outcome=Outcome.FAILED))
        elif member.outcome is Outcome.APPLYING and seat.open_window != update.id:
            _compare_applying(turn, update, member, seat, new_life=new_life)


def _compare_applying(turn: Turn, update: UpdateRecord, member: Member, seat: Seat, *, new_life: bool) -> None:
    if seat.active == update.target_digest and not seat.identifying:
        turn.put_member(update.id, replace(member, outcome=Outcome.APPLIED))
    elif new_life and turn.now > turn.led_at + turn.limits.lease_s:
        fail_member(turn, update.id, seat.id, "restarted during its window")
    else:
        _expect_soon(turn, update, seat.id)


def _expect_soon(turn: Turn, update: UpdateRecord, replica: str) -> None:
    """It is back with no window open: its report is on the way, or GO never reached it.

    A GO that is still queued there begins within its validity or expires, so nothing later is waited for.
    """
    effort = effort_of(turn, update)
    soon = turn.now + turn.limits.go_validity_s + turn.limits.report_margin_s
    due = min(soon, effort.due.get(replica, soon))
    turn.efforts.put(update.id, replace(effort, due={**effort.due, replica: due}))


def _forget_asked(turn: Turn, update: UpdateRecord, node: str) -> None:
    """A node that attached anew is asked again for all it has not reported as staged."""
    effort = turn.efforts.get(update.id)
    if effort is not None:
        turn.efforts.put(
            update.id,
            replace(
                effort,
                asked=frozenset(pair for pair in effort.asked if pair[0] != node),
                staged=frozenset(pair for pair in effort.staged if pair[0] != node),
            ),
        )


def _models_of(turn: Turn, digests: frozenset[str]) -> set[str]:
    return {v.model for v in turn.versions.values() if v.digest in digests}


def note_available(turn: Turn) -> None:
    """Versions that a verified holder brought within reach for the first time."""
    held = frozenset().union(*(n.held for n in turn.nodes.values() if n.connected and not n.quarantine))
    for key, version in list(turn.versions.items()):
        if version.digest in held and not version.available_once:
            turn.versions.put(key, replace(version, available_once=True))
            turn.note(
                NoteKind.VERSION_AVAILABLE,
                f"{version.model} {version.name} can be staged",
                model=version.model,
                version=version.name,
            )
            turn.touch(version.model)


def _current(turn: Turn, event: e.FromMember) -> Seat | Node | None:
    """The member the session belongs to; None for a session that was replaced."""
    for member in (turn.seats.get(event.member), turn.nodes.get(event.member)):
        if member is not None and member.connected and member.session == event.session:
            return member
    return None


def left(turn: Turn, event: e.Left) -> None:
    member = _current(turn, event)
    if member is not None:
        disconnect(turn, member, "its stream ended")


def disconnect(turn: Turn, member: Seat | Node, why: str) -> None:
    """Not there for now; it has the rest of its lease to come back."""
    if isinstance(member, Seat):
        turn.seats.put(member.id, replace(member, connected=False))
        turn.note(
            NoteKind.REPLICA_DETACHED,
            f"replica {member.id}: {why}",
            model=member.model,
            replica=member.id,
        )
        turn.touch(member.model)
        return
    turn.nodes.put(member.id, replace(member, connected=False))
    turn.note(NoteKind.NODE_DETACHED, f"node {member.id}: {why}", node=member.id)
    for version in list(turn.versions.values()):
        if version.digest in member.held and not turn.holders(version.digest):
            turn.note(
                NoteKind.VERSION_UNAVAILABLE,
                f"{version.model} {version.name}: no node that is here holds it",
                model=version.model,
                version=version.name,
            )


def heard(turn: Turn, event: e.FromMember) -> Seat | Node | None:
    """Renews the lease of whoever spoke; None when nobody is to be listened to."""
    member = _current(turn, event)
    lease_until = turn.now + turn.limits.lease_s
    if isinstance(member, Seat):
        member = replace(member, lease_until=lease_until)
        turn.seats.put(member.id, member)
    elif isinstance(member, Node):
        member = replace(member, lease_until=lease_until)
        turn.nodes.put(member.id, member)
    return member


def time_passed(turn: Turn, event: e.Ticked) -> None:
    if event.overslept_s:
        _begin_terms_anew(turn, event.overslept_s)
    expire_leases(turn)
    forget_the_lost(turn)
    for model in turn.models.values():
        turn.touch(model.name)


def _begin_terms_anew(turn: Turn, overslept_s: float) -> None:
    """Everyone has a whole term again to be heard from, as after a takeover, and every deadline its time.

    Streams broke while nobody answered on them, and reports of windows wait unread.
    """
    lease_until = turn.now + turn.limits.lease_s
    turn.led_at = turn.now
    for node in list(turn.nodes.values()):
        turn.nodes.put(node.id, replace(node, lease_until=max(node.lease_until, lease_until)))
    for seat in list(turn.seats.values()):
        turn.seats.put(seat.id, replace(seat, lease_until=max(seat.lease_until, lease_until)))
    for update, effort in list(turn.efforts.items()):
        due = {name: at + overslept_s for name, at in effort.due.items()}
        turn.efforts.put(update, replace(effort, deadline_at=effort.deadline_at + overslept_s, due=due))


def expire_leases(turn: Turn) -> None:
    """A silent member is disconnected; inside a window the window's deadline counts instead."""
    for node in list(turn.nodes.values()):
        if node.connected and turn.now >= node.lease_until:
            turn.end_session(node.session, "no heartbeat for a whole lease")
            disconnect(turn, node, "no heartbeat for a whole lease")
    for seat in list(turn.seats.values()):
        if seat.connected and turn.now >= seat.lease_until and not _in_window(turn, seat):
            turn.end_session(seat.session, "no heartbeat for a whole lease")
            disconnect(turn, seat, "no heartbeat for a whole lease")


def forget_the_lost(turn: Turn) -> None:
    """Whoever is away for long and owed nothing is no longer shown."""
    for node in list(turn.nodes.values()):
        if not node.connected and turn.now >= node.lease_until + turn.limits.forget_s:
            turn.nodes.drop(node.id)
    for seat in list(turn.seats.values()):
        long_gone = turn.now >= seat.lease_until + turn.limits.forget_s
        if seat.connected or not long_gone or _on_a_roster(turn, seat):
            continue
        turn.seats.drop(seat.id)
        record, model = turn.replicas[seat.id], turn.models[seat.model]
        if not record.excluded and record.desired == turn.digest_of(model.name, model.committed):
            turn.replicas.drop(seat.id)


def _on_a_roster(turn: Turn, seat: Seat) -> bool:
    return any(seat.id in update.members for update in turn.open_updates(seat.model))


def _in_window(turn: Turn, seat: Seat) -> bool:
    for update in turn.open_updates(seat.model):
        member = update.members.get(seat.id)
        if member and member.outcome in (Outcome.APPLYING, Outcome.RESTORING):
            return True
    return False
