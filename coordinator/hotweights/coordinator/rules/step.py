"""The table of events. Reads from top to bottom; each line is one rule's name."""

from hotweights.coordinator.rules import catalogue, fleet, reports
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.orders import Order
from hotweights.coordinator.rules.state import Node, Seat, State
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.update import advance


def step(state: State, event: e.Event) -> tuple[State, tuple[Order, ...]]:
    """What follows from an event. Raises Declined, having changed nothing."""
    turn = Turn(state, event.now)
    match event:
        case e.AgentAttached():
            fleet.agent_attached(turn, event)
        case e.ReplicaAttached():
            fleet.replica_attached(turn, event)
        case e.Left():
            fleet.left(turn, event)
        case e.FromMember():
            _heard(turn, event)
        case e.VersionPublished():
            catalogue.published(turn, event)
        case e.VersionDeleted():
            catalogue.deleted(turn, event)
        case e.UpdateAsked():
            catalogue.update_asked(turn, event)
        case e.CancelAsked():
            catalogue.cancel_asked(turn, event)
        case e.PolicySet():
            catalogue.policy_set(turn, event)
        case e.ModelResumed():
            catalogue.resumed(turn, event)
        case e.ReplicaUndrained():
            catalogue.undrained(turn, event)
        case e.CallRefused():
            turn.note_refusal(event.refusal, event.node)
        case e.Ticked():
            fleet.time_passed(turn, event)
        case _:
            raise TypeError(f"no rule for {type(event).__name__}")
    _settle(turn)
    return turn.done()


def _heard(turn: Turn, event: e.FromMember) -> None:
    """Whoever speaks is alive; a session that was replaced is not listened to."""
    member = fleet.heard(turn, event)
    match event, member:
        case _, None:
            return
        case e.StageProgressed(), Node():
            reports.stage_progressed(turn, member, event)
        case e.SourceLeft(), Node():
            reports.source_left(turn, member, event)
        case e.Staged(), Node():
            reports.staged(turn, member, event)
        case e.StageFailed(), Node():
            reports.stage_failed(turn, member, event)
        case e.HeldChanged(), Node():
            reports.held_changed(turn, member, event)
        case e.Prepared(), Seat():
            reports.prepared(turn, member, event)
        case e.PrepareFailed(), Seat():
            reports.prepare_failed(turn, member, event)
        case e.Applied(), Seat():
            reports.applied(turn, member, event)
        case e.ApplyFailed(), Seat():
            reports.apply_failed(turn, member, event)
        case e.Deferred(), Seat():
            reports.deferred(turn, member, event)
        case e.ActiveChanged(), Seat():
            reports.active_changed(turn, member, event)
        case e.OrderRefused(), Seat() | Node():
            reports.order_refused(turn, member, event)
        case _:
            pass  # A heartbeat, or a report that is not this kind of member's to make.


def _settle(turn: Turn) -> None:
    """Moves the updates of every model the event touched as far as they go now."""
    if not turn.touched:
        return
    done: set[str] = set()
    while turn.touched - done:
        model = min(turn.touched - done)
        done.add(model)
        for update in turn.open_updates(model):
            advance(turn, update.id)
        catalogue.begin_what_is_due(turn, model)
        for update in turn.open_updates(model):
            advance(turn, update.id)
    catalogue.tell_pins(turn)
