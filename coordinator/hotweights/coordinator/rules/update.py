"""An update's way through its phases.

        StartUpdate       every node staged        every replica applied
    IDLE ----------> STAGING ----------------> APPLYING ----------------> COMMITTED
                        |                         |                     (decision COMMIT)
                        | failure, cancel,        | failed check, failure under policy
                        v deadline                v "rollback", cancel
                     ABORTED <-- nobody applied   ROLLING_BACK ------------> ROLLED_BACK
                                                  (decision ABORT)

`advance` moves an update as far as it can go now; it may be called at any time and as often as one
likes. A replica in doubt is rolled back, never assumed untouched.
"""

from dataclasses import replace

from hotweights.coordinator.rules.agreement import doubt_restored, note_differences
from hotweights.coordinator.rules.chains import route
from hotweights.coordinator.rules.orders import Declined, End, NoteKind, Prepare, Stage
from hotweights.coordinator.rules.records import (
    OUT,
    Decision,
    FailurePolicy,
    Kind,
    Member,
    Outcome,
    Phase,
    UpdateRecord,
)
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.waves import share
from hotweights.coordinator.rules.windows import effort_of, tell_apply, window_is_out

# The reason of a catch-up's end that is nobody's failure.
SUPERSEDED = "a fleet update takes its place"
# Of a member that had GO: nothing more will be heard or asked.
RESTED = {Outcome.RESTORED, Outcome.DIVERGED, Outcome.TORN}


def advance(turn: Turn, update_id: str) -> None:
    """Moves the update as far as it goes."""
    while True:
        before = turn.updates[update_id]
        match before.phase:
            case Phase.STAGING:
                _advance_staging(turn, before)
            case Phase.APPLYING:
                _advance_applying(turn, before)
            case Phase.ROLLING_BACK:
                _advance_rolling_back(turn, before)
            case _:
                return
        if turn.updates[update_id].phase is before.phase:
            return


def cancel(turn: Turn, update: UpdateRecord) -> None:
    """Races with the last report on the decision: after COMMIT it is declined, after ABORT done."""
    if update.decision is Decision.COMMIT:
        raise Declined(
            "FAILED_PRECONDITION",
            "UPDATE_COMMITTED",
            f"update {update.id} is committed; roll back instead",
            update=update.id,
        )
    if update.decision is Decision.NONE:
        abort(turn, update, "cancelled")
        advance(turn, update.id)


# Staging.


def _advance_staging(turn: Turn, update: UpdateRecord) -> None:
    effort = effort_of(turn, update)
    for member in update.members.values():
        if member.outcome is Outcome.STAGING:
            make_ready(turn, update.id, member)
        if turn.updates[update.id].phase is not Phase.STAGING:
            return
    update = turn.updates[update.id]
    taking_part = [m for m in update.members.values() if m.outcome not in OUT]
    late = [m.replica for m in taking_part if m.outcome is not Outcome.PREPARED]
    if not taking_part:
        abort(turn, update, update.reason or "no replica is left")
    elif not late:
        _begin_applying(turn, update)
    elif turn.now >= effort.deadline_at:
        names = ", ".join(late[:5])
        abort(turn, update, f"not staged and prepared in time: {len(late)} of them, {names}")


def make_ready(turn: Turn, update_id: str, member: Member) -> None:
    """Asks for what the member still lacks: images on its nodes, then the replica's own check."""
    if turn.seat_lost(turn.updates[update_id].model, member.replica):
        fail_member(turn, update_id, member.replica, "out of contact")
        return
    seat = turn.seats.get(member.replica)
    if seat is None or not seat.connected or seat.identifying:
        return
    update = turn.updates[update_id]
    asked = seat.id in effort_of(turn, update).preparing and member.base == seat.active
    if asked and not any(turn.node_lost(node, update.started_at) for node in member.nodes):
        return  # its answer is awaited: every report comes by here, so this way is short
    if _busy(turn, update_id, seat.id):
        return
    if member.base != seat.active:
        member = replace(member, base=seat.active)
        turn.put_member(update_id, member)
    if _stage_nodes(turn, update_id, member):
        update, effort = turn.updates[update_id], turn.efforts[update_id]
        if seat.id not in effort.preparing:
            left_s = max(1.0, effort.deadline_at - turn.now)
            ticket = turn.tell(seat, Prepare(update.target_digest, left_s, update.options.check_finite), update_id)
            preparing = {**effort.preparing, seat.id: ticket}
            turn.efforts.put(update_id, replace(effort, preparing=preparing))


def _busy(turn: Turn, update_id: str, replica: str) -> bool:
    """Whether another update had GO for it and is not over: one outstanding order a replica, always."""
    for other in turn.open_updates(turn.updates[update_id].model):
        member = other.members.get(replica)
        if other.id != update_id and member is not None and member.ticket is not None:
            return True
    return False


def _stage_nodes(turn: Turn, update_id: str, member: Member) -> bool:
    """Whether target and way back are staged on all nodes of the member; asks for what is not."""
    update, effort = turn.updates[update_id], effort_of(turn, turn.updates[update_id])
    wanted = [d for d in dict.fromkeys((update.target_digest, member.base)) if d]
    asked, complete = set[tuple[str, str]](), True
    for node_id in member.nodes:
        if turn.node_lost(node_id, update.started_at):
            fail_member(turn, update_id, member.replica, f"no agent on node {node_id}")
            return False
        node = turn.nodes.get(node_id)
        for digest in wanted:
            if (node_id, digest) in effort.staged:
                continue
            complete = False
            if node is not None and node.connected and (node_id, digest) not in effort.asked:
                asked.add((node_id, digest))
                left_s = max(1.0, effort.deadline_at - turn.now)
                turn.tell(node, Stage(digest, route(turn, update, digest, node_id), left_s), update_id)
    if asked:
        effort = turn.efforts[update_id]
        turn.efforts.put(update_id, replace(effort, asked=effort.asked | asked))
    return complete


# Applying.


def _begin_applying(turn: Turn, update: UpdateRecord) -> None:
    turn.put_update(replace(update, phase=Phase.APPLYING, wave=0))
    turn.note_update(NoteKind.UPDATE_PHASE, update, f"{update.id}: all staged, applying")


def _advance_applying(turn: Turn, update: UpdateRecord) -> None:
    effort_of(turn, update)
    _end_overdue(turn, update.id)
    if turn.updates[update.id].phase is not Phase.APPLYING:
        return
    while _send_wave(turn, update.id):
        update = turn.updates[update.id]
        last = max(m.wave for m in update.members.values())
        if update.wave >= last:
            _decide(turn, update)
            return
        turn.put_update(replace(update, wave=update.wave + 1))


def _decide(turn: Turn, update: UpdateRecord) -> None:
    """All waves are through, and who applied agrees as far as this leader knows.

    A new leader knows once it has heard of each again, or a lease is over.
    """
    applied = [m.replica for m in update.members.values() if m.outcome is Outcome.APPLIED]
    if not applied:
        abort(turn, update, update.reason or "no replica applied it")
    elif not any(turn.seats.get(name) is None and not turn.seat_lost(update.model, name) for name in applied):
        commit(turn, update)


def _send_wave(turn: Turn, update_id: str) -> bool:
    """Gives GO to whom it can in the present wave; whether that wave is through.

    Who failed or differs comes first: a GO must not be told in the same breath as the ABORT that revokes it.
    """
    for member in _wave(turn, update_id):
        if member.outcome is Outcome.STAGING:
            _make_ready_again(turn, update_id, member)
        elif member.outcome is Outcome.PREPARED and turn.seat_lost(turn.updates[update_id].model, member.replica):
            fail_member(turn, update_id, member.replica, "out of contact")
        elif member.outcome is Outcome.PREPARED:
            _spare(turn, update_id, member)
        if turn.updates[update_id].phase is not Phase.APPLYING:
            return False
    if not _agree(turn, turn.updates[update_id]):
        return False
    for member in _wave(turn, update_id):
        if member.outcome is Outcome.PREPARED:
            _go(turn, update_id, member)
    return all(member.outcome is Outcome.APPLIED or member.outcome in OUT for member in _wave(turn, update_id))


def _wave(turn: Turn, update_id: str) -> list[Member]:
    update = turn.updates[update_id]
    return [member for member in update.members.values() if member.wave == update.wave]


def _make_ready_again(turn: Turn, update_id: str, member: Member) -> None:
    """It connected anew since it was prepared; from its wave on it has the time that staging had."""
    update, effort = turn.updates[update_id], effort_of(turn, turn.updates[update_id])
    due = effort.due.get(member.replica)
    if due is None:
        due = turn.now + update.options.staging_deadline_s
        turn.efforts.put(update_id, replace(effort, due={**effort.due, member.replica: due}))
    if turn.now >= due:
        fail_member(turn, update_id, member.replica, "was not prepared again in time")
    else:
        make_ready(turn, update_id, member)


def _agree(turn: Turn, update: UpdateRecord) -> bool:
    """Whether all that serve the target have the same installed; else the update is aborted, whatever its policy.

    Looked at before every GO and before COMMIT, so that a new leader finds what an old one was told.
    """
    if not any(member.outcome is Outcome.APPLIED for member in update.members.values()):
        return True
    found = note_differences(turn, update, update.target_digest)
    if not found:
        return True
    more = f"; {len(found) - 1} more differ" if len(found) > 1 else ""
    abort(turn, update, found[0].reason + more)
    return False


def _spare(turn: Turn, update_id: str, member: Member) -> None:
    """One that serves the target already needs no GO."""
    seat, update = turn.seats.get(member.replica), turn.updates[update_id]
    serves = seat is not None and seat.connected and seat.active == update.target_digest
    if serves and not _busy(turn, update_id, member.replica):
        turn.desire(update.model, member.replica, update.target_digest)
        turn.put_member(update_id, replace(member, outcome=Outcome.APPLIED, reason="served it already"))


def _go(turn: Turn, update_id: str, member: Member) -> None:
    """Desired becomes the target durably before GO is spoken: both leave in one write."""
    seat = turn.seats.get(member.replica)
    if seat is None or not seat.connected or _busy(turn, update_id, seat.id):
        return
    update = turn.updates[update_id]
    turn.desire(update.model, member.replica, update.target_digest)
    ticket = tell_apply(turn, update, seat, update.target_digest, restore=False)
    turn.put_member(update_id, replace(member, outcome=Outcome.APPLYING, ticket=ticket))


def _end_overdue(turn: Turn, update_id: str) -> None:
    """A GO without a report by its deadline is a failure; whether it took effect is unknown."""
    for member in list(turn.updates[update_id].members.values()):
        if member.outcome is not Outcome.APPLYING:
            continue
        effort = turn.efforts[update_id]
        due = effort.due.get(member.replica)
        if due is None:
            options = turn.updates[update_id].options
            due = turn.now + turn.limits.lease_s + options.quiesce_deadline_s
            due += 3 * options.apply_deadline_s + turn.limits.report_margin_s
            deadline_at = effort.deadline_at
            if turn.updates[update_id].phase is Phase.ROLLING_BACK:
                deadline_at = max(deadline_at, due + turn.limits.roll_back_deadline_s)
            due_of = {**effort.due, member.replica: due}
            turn.efforts.put(update_id, replace(effort, deadline_at=deadline_at, due=due_of))
        if turn.now >= due:
            fail_member(turn, update_id, member.replica, "GO was sent and no report came in time")


def commit(turn: Turn, update: UpdateRecord) -> None:
    """Every replica applied: the model's committed version changes, here and nowhere else."""
    update = replace(update, phase=Phase.COMMITTED, decision=Decision.COMMIT, ended_at=turn.now, reason="")
    turn.put_update(update)
    if update.kind is not Kind.CATCH_UP:
        model = turn.models[update.model]
        history = model.history
        if update.kind is Kind.ROLLBACK and update.target in history:
            history = history[history.index(update.target) + 1 :]
        elif update.base:
            history = (update.base, *(v for v in history if v != update.base))
        history = tuple(v for v in history if v != update.target)[: turn.limits.history_max]
        turn.models.put(model.name, replace(model, committed=update.target, history=history))
        _desire_committed(turn, update)
    else:
        for name in update.members:
            if (record := turn.record_of(update.model, name)) is not None:
                turn.replicas.put(name, replace(record, failures=0, retry_at=0.0))
    _ended(turn, update, f"{update.id}: {update.target} is committed")


def _desire_committed(turn: Turn, update: UpdateRecord) -> None:
    """Joiners since the roster was frozen desire committed, too."""
    for record in list(turn.replicas.values()):
        if record.model == update.model and not record.excluded:
            turn.desire(update.model, record.id, update.target_digest)


# Failing and going back.


def fail_member(turn: Turn, update_id: str, replica: str, reason: str, *, torn: bool = False) -> None:
    """One replica failed: what that means for the update is the policy's to say."""
    update = turn.updates[update_id]
    member = update.members[replica]
    had_go = member.outcome is Outcome.APPLYING
    outcome = Outcome.TORN if torn else Outcome.FAILED
    update = turn.put_member(update_id, replace(member, outcome=outcome, reason=reason))
    turn.note_update(NoteKind.REPLICA_FAILED, update, f"{replica}: {reason}", replica=replica)
    if update.phase is Phase.ROLLING_BACK:
        return
    told = f"replica {replica}: {reason}"
    # A failed canary always rolls back.
    canary = update.phase is Phase.APPLYING and member.wave == 0
    if update.options.failure_policy is FailurePolicy.ROLLBACK or canary:
        abort(turn, update, told)
        return
    excluded = replace(update.members[replica], outcome=Outcome.EXCLUDED if not torn else outcome)
    update = turn.put_member(update_id, excluded)
    update = turn.put_update(replace(update, reason=told))
    if (record := turn.record_of(update.model, replica)) is not None:
        turn.replicas.put(replica, replace(record, excluded=True))
    turn.note_update(NoteKind.REPLICA_EXCLUDED, update, f"{replica}: left behind, {reason}", replica=replica)
    if had_go:
        # It may serve either version: what it should serve is what it served.
        turn.desire(update.model, replica, member.base)
    failures = sum(m.outcome in OUT for m in update.members.values())
    if failures > share(update.options.max_failed, len(update.members)):
        abort(turn, update, f"{failures} replicas failed, the last one {told}")


def abort(turn: Turn, update: UpdateRecord, reason: str) -> None:
    """The decision ABORT. Desired goes back for all that had GO, before anyone is told."""
    for member in update.members.values():
        if member.ticket is not None or member.outcome is Outcome.APPLIED:
            turn.desire(update.model, member.replica, member.base)
    if all(m.ticket is None for m in update.members.values()):
        ended = replace(
            update,
            phase=Phase.ABORTED,
            decision=Decision.ABORT,
            reason=reason,
            ended_at=turn.now,
        )
        turn.put_update(ended)
        _ended(turn, ended, f"{update.id}: aborted, {reason}")
        return
    back = replace(update, phase=Phase.ROLLING_BACK, decision=Decision.ABORT, reason=reason)
    turn.put_update(back)
    effort = effort_of(turn, back)
    # A GO that is out keeps its whole time, and the way back comes after it.
    windows_end = [effort.due.get(m.replica, turn.now) for m in back.members.values() if window_is_out(effort, m)]
    deadline_at = max([turn.now, *windows_end]) + turn.limits.roll_back_deadline_s
    turn.efforts.put(update.id, replace(effort, deadline_at=deadline_at))
    turn.note_update(NoteKind.UPDATE_PHASE, back, f"{update.id}: rolling back, {reason}")


def _advance_rolling_back(turn: Turn, update: UpdateRecord) -> None:
    effort_of(turn, update)
    _end_overdue(turn, update.id)
    for member in list(turn.updates[update.id].members.values()):
        if member.ticket is not None and member.outcome not in RESTED:
            _take_back(turn, update.id, member)
    update = turn.updates[update.id]
    waiting = [m for m in update.members.values() if m.ticket and m.outcome not in RESTED]
    if not waiting:
        update = doubt_restored(turn, update)
        ended = replace(update, phase=Phase.ROLLED_BACK, ended_at=turn.now)
        turn.put_update(ended)
        _ended(turn, ended, f"{update.id}: rolled back, {update.reason}")


def _take_back(turn: Turn, update_id: str, member: Member) -> None:
    update, effort = turn.updates[update_id], turn.efforts[update_id]
    ends_at = effort.deadline_at
    is_out = window_is_out(effort, member)
    if is_out:
        ends_at = effort.due.get(member.replica, ends_at)
    overdue = turn.now >= ends_at
    lost = turn.seat_lost(turn.updates[update_id].model, member.replica)
    if lost or overdue:
        why = "out of contact" if lost else "did not go back in time"
        turn.put_member(update_id, replace(member, outcome=Outcome.DIVERGED, reason=why))
        return
    if is_out:
        return
    seat = turn.seats.get(member.replica)
    if seat is not None and seat.connected and not _busy(turn, update_id, seat.id):
        ticket = tell_apply(turn, update, seat, member.base, restore=True)
        turn.put_member(update_id, replace(member, outcome=Outcome.RESTORING, ticket=ticket))


def _ended(turn: Turn, update: UpdateRecord, message: str) -> None:
    """Tells everyone who took part that what was kept for the way back may go."""
    turn.note_update(NoteKind.UPDATE_ENDED, update, message)
    committed = update.decision is Decision.COMMIT
    for name in update.members:
        seat = turn.seats.get(name)
        if seat is not None and seat.connected and seat.model == update.model:
            turn.tell(seat, End(committed), update.id)
    if update.kind is Kind.CATCH_UP and not committed:
        _back_off(turn, update)
    turn.efforts.drop(update.id)
    turn.touch(update.model)


def _back_off(turn: Turn, update: UpdateRecord) -> None:
    """A catch-up that failed waits longer each time; after three the replica is left alone."""
    if update.reason == SUPERSEDED:
        return
    for name in update.members:
        record = turn.record_of(update.model, name)
        if record is None:
            continue
        failures = record.failures + 1
        excluded = failures >= turn.limits.catch_up_failures_max
        wait_s = turn.limits.catch_up_backoff_s * 2 ** (failures - 1)
        turn.replicas.put(
            name,
            replace(record, failures=failures, excluded=excluded, retry_at=turn.now + wait_s),
        )
        if excluded:
            turn.note_update(
                NoteKind.REPLICA_EXCLUDED,
                update,
                f"{name}: excluded after {failures} failed catch-ups; `hotweights undrain` lets it in",
                replica=name,
            )
