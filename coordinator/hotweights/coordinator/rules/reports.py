"""What members report. A report counts only for the order it names; stale and doubled ones change nothing."""

from dataclasses import replace

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.fleet import note_available
from hotweights.coordinator.rules.orders import End, NoteKind
from hotweights.coordinator.rules.records import Member, Outcome, Phase, Ticket, UpdateRecord
from hotweights.coordinator.rules.state import Node, Progress, Seat
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.update import fail_member
from hotweights.coordinator.rules.windows import defer, effort_of

LEFT_MAX = 1000  # events of one update


def stage_progressed(turn: Turn, node: Node, event: e.StageProgressed) -> None:
    effort = turn.efforts.get(event.update)
    if effort is not None:
        moved = event.bytes_done, event.bytes_total
        now = Progress(*moved, event.source, event.bytes_per_s, event.wire_bytes, event.transport)
        turn.efforts.put(event.update, replace(effort, progress={**effort.progress, node.id: now}))


def source_left(turn: Turn, node: Node, event: e.SourceLeft) -> None:
    """An event for the person who watches; a source of which two say that it lies is nobody's any longer."""
    update, effort = turn.updates.get(event.update), turn.efforts.get(event.update)
    told = (node.id, event.source, event.reason)
    if update is not None and effort is not None and told not in effort.left and len(effort.left) < LEFT_MAX:
        turn.efforts.put(event.update, replace(effort, left=effort.left | {told}))
        message = f"node {node.id} left its source {event.source}: {event.reason}"
        turn.note_update(NoteKind.SOURCE_LEFT, update, message)
    source = turn.nodes.get(event.source)
    if not event.lied or source is None or source.quarantine or event.source == node.id:
        return
    if update is None or not update.phase.is_open or effort is None or (node.id, event.digest) not in effort.asked:
        return  # nobody told it to fetch that
    accused = replace(source, accusers=source.accusers | {node.id})
    turn.nodes.put(accused.id, accused)
    if accused.quarantine:
        turn.note(
            NoteKind.NODE_QUARANTINED,
            f"node {accused.id} {accused.quarantine}: nobody is told to fetch from it until its agent is started again",
            node=accused.id,
        )


def staged(turn: Turn, node: Node, event: e.Staged) -> None:
    turn.nodes.put(node.id, replace(turn.nodes[node.id], held=node.held | {event.digest}))
    update, effort = turn.updates.get(event.update), turn.efforts.get(event.update)
    if update is not None and effort is not None:
        pair = (node.id, event.digest)
        turn.efforts.put(event.update, replace(effort, staged=effort.staged | {pair}))
        what = update.target if event.digest == update.target_digest else "its way back"
        turn.note_update(NoteKind.NODE_STAGED, update, f"node {node.id} staged {what}")
        turn.touch(update.model)
    note_available(turn)


def stage_failed(turn: Turn, node: Node, event: e.StageFailed) -> None:
    """Every replica on the node that waits for the image fails with the node's reason."""
    update = turn.updates.get(event.update)
    if update is None or not update.phase.is_open:
        return
    for member in update.members.values():
        waits = member.outcome is Outcome.STAGING and node.id in member.nodes
        if waits and turn.updates[update.id].phase in (Phase.STAGING, Phase.APPLYING):
            fail_member(turn, update.id, member.replica, f"node {node.id}: {event.reason}")
    turn.touch(update.model)


def held_changed(turn: Turn, node: Node, event: e.HeldChanged) -> None:
    changed = replace(
        turn.nodes[node.id],
        held=event.held,
        bytes_used=event.bytes_used,
        bytes_free=event.bytes_free,
    )
    turn.nodes.put(node.id, changed)
    note_available(turn)
    for version in turn.versions.values():
        if version.digest in node.held - event.held and not turn.holders(version.digest):
            turn.note(
                NoteKind.VERSION_UNAVAILABLE,
                f"{version.model} {version.name}: node {node.id} holds it no longer",
                model=version.model,
                version=version.name,
            )


def prepared(turn: Turn, seat: Seat, event: e.Prepared) -> None:
    update = _expected(turn, seat, event.update, event.ticket)
    if update is None:
        return
    if event.routes is not None:
        turn.seats.put(seat.id, replace(turn.seats[seat.id], routes=event.routes))
    member = update.members[seat.id]
    if member.outcome is Outcome.STAGING:
        turn.put_member(update.id, replace(member, outcome=Outcome.PREPARED, base=event.base))
        turn.touch(update.model)


def prepare_failed(turn: Turn, seat: Seat, event: e.PrepareFailed) -> None:
    update = _expected(turn, seat, event.update, event.ticket)
    if update is not None and update.members[seat.id].outcome is Outcome.STAGING:
        fail_member(turn, update.id, seat.id, event.reason)
        turn.touch(update.model)


def _expected(turn: Turn, seat: Seat, update_id: str, ticket: Ticket) -> UpdateRecord | None:
    """The open update whose Prepare this answers; None for a stale or doubled report."""
    update, effort = turn.updates.get(update_id), turn.efforts.get(update_id)
    if update is None or effort is None or update.phase not in (Phase.STAGING, Phase.APPLYING):
        return None
    return update if effort.preparing.get(seat.id) == ticket else None


def _answered(turn: Turn, seat: Seat, update_id: str, ticket: Ticket) -> Member | None:
    """The member whose outstanding window this reports on.

    Epoch and number must both be those of the order: numbers start anew with each epoch.
    """
    update = turn.updates.get(update_id)
    member = update.members.get(seat.id) if update is not None and update.phase.is_open else None
    return member if member is not None and member.ticket == ticket else None


def _hear_late(turn: Turn, seat: Seat, event: e.Applied | e.ApplyFailed) -> None:
    """A window that hung may end after all: that moves no update, but says what is served.

    Listened to once the update is over, or while its way back, told meanwhile, is waited for.
    """
    update, ticket = turn.updates.get(event.update), event.ticket
    member = update.members.get(seat.id) if update is not None else None
    if update is None or member is None:
        return
    given_up = not update.phase.is_open or member.outcome is Outcome.RESTORING
    newest = seat.heard is None or (seat.heard.epoch, seat.heard.number) <= (ticket.epoch, ticket.number)
    if given_up and newest:
        fingerprints = event.fingerprints if isinstance(event, e.Applied) else ()
        serving = turn.seats[seat.id].serving(event.active, fingerprints)
        turn.seats.put(seat.id, replace(serving, open_window="", heard=ticket))
        turn.touch(seat.model)


def applied(turn: Turn, seat: Seat, event: e.Applied) -> None:
    member = _answered(turn, seat, event.update, event.ticket)
    if member is None:
        _hear_late(turn, seat, event)
        return
    turn.seats.put(
        seat.id,
        replace(
            turn.seats[seat.id],
            active=event.active,
            identifying=False,
            fingerprints=event.fingerprints,
            window=event.window,
            open_window="",
            note=event.note,
            heard=event.ticket,
        ),
    )
    update = turn.updates[event.update]
    restoring = member.outcome is Outcome.RESTORING
    wanted = member.base if restoring else update.target_digest
    if member.outcome not in (Outcome.APPLYING, Outcome.RESTORING):
        return
    if event.active != wanted:
        fail_member(turn, update.id, seat.id, f"it serves {event.active[:12] or 'nothing known'}")
    else:
        outcome = Outcome.RESTORED if restoring else Outcome.APPLIED
        turn.put_member(update.id, replace(member, outcome=outcome, reason=event.note, window=event.window))
        kind = NoteKind.REPLICA_RESTORED if restoring else NoteKind.REPLICA_APPLIED
        window = event.window
        message = (
            f"{seat.id}: {outcome.value}, paused {window.quiesce_ms:.1f} + {window.apply_ms:.1f} "
            f"+ {window.resume_ms:.1f} ms (quiesce, apply, resume)"
        )
        turn.note_update(kind, update, message, replica=seat.id, window=window)
    turn.touch(update.model)


def apply_failed(turn: Turn, seat: Seat, event: e.ApplyFailed) -> None:
    member = _answered(turn, seat, event.update, event.ticket)
    if member is None:
        _hear_late(turn, seat, event)
        return
    serving = turn.seats[seat.id].serving(event.active)
    turn.seats.put(seat.id, replace(serving, open_window="", note=event.reason, heard=event.ticket))
    if member.outcome is Outcome.RESTORING:
        outcome = Outcome.TORN if event.torn else Outcome.DIVERGED
        turn.put_member(event.update, replace(member, outcome=outcome, reason=event.reason))
    elif member.outcome is Outcome.APPLYING:
        fail_member(turn, event.update, seat.id, event.reason, torn=event.torn)
    turn.touch(seat.model)


def deferred(turn: Turn, seat: Seat, event: e.Deferred) -> None:
    """Its owner has it asleep: nothing of it serves, so there is time, until it wakes or the update goes back."""
    member = _answered(turn, seat, event.update, event.ticket)
    if member is None:
        _call_back(turn, seat, event.update)
        return
    if member.outcome is not Outcome.APPLYING:
        return
    update = turn.updates[event.update]
    if seat.id not in effort_of(turn, update).deferred:
        turn.put_member(update.id, replace(member, reason=event.reason))
        turn.note_update(NoteKind.REPLICA_DEFERRED, update, f"{seat.id}: {event.reason}", replica=seat.id)
    defer(turn, update, seat.id)
    turn.touch(update.model)


def _call_back(turn: Turn, seat: Seat, update_id: str) -> None:
    """It waits for a wake-up on an order that was taken back while it was away, so that any order ends the wait."""
    update = turn.updates.get(update_id)
    if not any(seat.id in other.members for other in turn.open_updates(seat.model)):
        turn.tell(seat, End(committed=False), update_id)
    elif update is not None and update.phase.is_open and update.members[seat.id].outcome is Outcome.RESTORING:
        # The way back was lost with the stream: it is asked again.
        turn.put_member(update_id, replace(update.members[seat.id], outcome=Outcome.FAILED))
        turn.touch(update.model)


def active_changed(turn: Turn, seat: Seat, event: e.ActiveChanged) -> None:
    serving = turn.seats[seat.id].serving(event.active, event.fingerprints)
    turn.seats.put(seat.id, replace(serving, identifying=False, note=event.note))
    turn.touch(seat.model)


def order_refused(turn: Turn, member: Seat | Node, event: e.OrderRefused) -> None:
    """A NACK ends what the order was part of, as a failure report would."""
    who = (event.now, event.member, event.session)
    reason = f"refused: {event.reason}"
    if isinstance(member, Node):
        stage_failed(turn, member, e.StageFailed(*who, event.update, "", reason))
    elif _expected(turn, member, event.update, event.ticket) is not None:
        failed = e.PrepareFailed(*who, event.update, event.ticket, reason)
        prepare_failed(turn, member, failed)
    else:
        not_applied = e.ApplyFailed(*who, event.update, event.ticket, reason, member.active)
        apply_failed(turn, member, not_applied)
