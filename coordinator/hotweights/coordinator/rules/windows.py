"""Orders that open a window on a replica, and how long the report of each may take.

GO --> report within its window's time, or from one asleep: deferred --> report within the time of sleep as well
"""

from dataclasses import replace

from hotweights.coordinator.rules.orders import Apply
from hotweights.coordinator.rules.records import Member, Outcome, Phase, Ticket, UpdateRecord
from hotweights.coordinator.rules.state import Effort, Seat
from hotweights.coordinator.rules.turn import Turn


def effort_of(turn: Turn, update: UpdateRecord) -> Effort:
    """This leader's work on the update; a new leader grants the phase its whole time again."""
    effort = turn.efforts.get(update.id)
    if effort is None:
        wait_s = (
            turn.limits.roll_back_deadline_s
            if update.phase is Phase.ROLLING_BACK
            else update.options.staging_deadline_s
        )
        effort = Effort(deadline_at=turn.now + wait_s)
        turn.efforts.put(update.id, effort)
    return effort


def tell_apply(turn: Turn, update: UpdateRecord, seat: Seat, digest: str, *, restore: bool) -> Ticket:
    """GO, or the way back; the deadline of its report begins."""
    options, limits = update.options, turn.limits
    version = turn.version_of(update.model, digest) if restore else update.target
    action = Apply(
        digest=digest,
        version=version,
        inflight=options.inflight,
        validity_s=limits.go_validity_s,
        quiesce_deadline_s=options.quiesce_deadline_s,
        apply_deadline_s=options.apply_deadline_s,
        asleep_deadline_s=options.asleep_deadline_s,
        restore=restore,
    )
    ticket = turn.tell(seat, action, update.id)
    effort = effort_of(turn, update)
    due = turn.now + _window_s(turn, update)
    turn.efforts.put(update.id, replace(effort, due={**effort.due, seat.id: due}, deferred=effort.deferred - {seat.id}))
    return ticket


def _window_s(turn: Turn, update: UpdateRecord) -> float:
    """How long after GO the report of a window may take: an apply, the undo if it fails, the proof of what serves."""
    options, limits = update.options, turn.limits
    return limits.go_validity_s + options.quiesce_deadline_s + 3 * options.apply_deadline_s + limits.report_margin_s


def defer(turn: Turn, update: UpdateRecord, replica: str) -> None:
    """Its window opens when it wakes: the deadline of its report is put off, and it can be called back at once.

    What it could not check asleep it checks then, in the time of an apply.
    """
    effort, options = effort_of(turn, update), update.options
    due = turn.now + options.asleep_deadline_s + options.apply_deadline_s + _window_s(turn, update)
    if replica not in effort.deferred:
        changed = replace(effort, due={**effort.due, replica: due}, deferred=effort.deferred | {replica})
        turn.efforts.put(update.id, changed)


def any_window_out(turn: Turn, update: UpdateRecord) -> bool:
    """Whether somebody had GO and may act on it without being woken first."""
    deferred = effort_of(turn, update).deferred
    return any(m.ticket is not None and m.replica not in deferred for m in update.members.values())


def window_is_out(effort: Effort, member: Member) -> bool:
    """Whether a window of it is open or may open any moment: not of one that sleeps, which is called back instead."""
    if member.outcome is Outcome.RESTORING:
        return True
    return member.outcome is Outcome.APPLYING and member.replica not in effort.deferred
