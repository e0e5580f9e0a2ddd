"""The table: every event against every place a replica can be in, the moves and the non-moves.

A fleet of three: `r0` is the canary, `r1` the one looked at, `r2` keeps the update open.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from tests.coordinator.rules.bench import WINDOW

from hotweights.coordinator.rules import Declined, State, step
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import (
    Decision,
    FailurePolicy,
    Kind,
    Member,
    ModelRecord,
    Options,
    Outcome,
    Phase,
    ReplicaRecord,
    Ticket,
    UpdateRecord,
    VersionRecord,
)
from hotweights.coordinator.rules.state import Effort, Node, Seat

NOW = 1000.0
EPOCH = 7
D1, D2 = "d1", "d2"
TICKET = Ticket(EPOCH, 11)
OTHER = Ticket(EPOCH, 12)
ME, SESSION = "r1", "s-r1"
SOON = NOW + 500


@dataclass(frozen=True)
class Place:
    """Where an update and its members are."""

    phase: Phase
    me: Outcome
    canary: Outcome
    companion: Outcome
    policy: FailurePolicy = FailurePolicy.ROLLBACK
    had_go: bool = False
    staged: bool = True
    away: bool = False
    wave: int = 1


S, A, B = Phase.STAGING, Phase.APPLYING, Phase.ROLLING_BACK
X = Outcome
EVICT = FailurePolicy.EVICT
PLACES = {
    "staging, unstaged": Place(S, X.STAGING, X.PREPARED, X.STAGING, staged=False, wave=0),
    "staging, preparing": Place(S, X.STAGING, X.PREPARED, X.STAGING, wave=0),
    "staging, preparing, evict": Place(S, X.STAGING, X.PREPARED, X.STAGING, EVICT, wave=0),
    "staging, prepared": Place(S, X.PREPARED, X.PREPARED, X.STAGING, wave=0),
    "staging, excluded": Place(S, X.EXCLUDED, X.PREPARED, X.STAGING, EVICT, wave=0),
    "applying, preparing": Place(A, X.STAGING, X.APPLIED, X.APPLYING),
    "applying, waiting": Place(A, X.PREPARED, X.APPLYING, X.PREPARED),
    "applying, applying": Place(A, X.APPLYING, X.APPLIED, X.APPLYING, had_go=True),
    "applying, applying, evict": Place(A, X.APPLYING, X.APPLIED, X.APPLYING, EVICT, had_go=True),
    "applying, applied": Place(A, X.APPLIED, X.APPLIED, X.APPLYING, had_go=True),
    "applying, excluded": Place(A, X.EXCLUDED, X.APPLIED, X.APPLYING, EVICT, had_go=True),
    "applying, torn": Place(A, X.TORN, X.APPLIED, X.APPLYING, EVICT, had_go=True),
    "back, applying": Place(B, X.APPLYING, X.RESTORED, X.RESTORING, had_go=True),
    "back, applied, away": Place(B, X.APPLIED, X.RESTORED, X.RESTORING, had_go=True, away=True),
    "back, failed, away": Place(B, X.FAILED, X.RESTORED, X.RESTORING, had_go=True, away=True),
    "back, never had GO": Place(B, X.PREPARED, X.RESTORED, X.RESTORING),
    "back, restoring": Place(B, X.RESTORING, X.RESTORED, X.RESTORING, had_go=True),
    "back, restored": Place(B, X.RESTORED, X.RESTORED, X.RESTORING, had_go=True),
    "back, diverged": Place(B, X.DIVERGED, X.RESTORED, X.RESTORING, had_go=True),
    "back, torn": Place(B, X.TORN, X.RESTORED, X.RESTORING, had_go=True),
    "committed": Place(Phase.COMMITTED, X.APPLIED, X.APPLIED, X.APPLIED, had_go=True),
    "rolled back": Place(Phase.ROLLED_BACK, X.RESTORED, X.RESTORED, X.RESTORED, had_go=True),
    "aborted": Place(Phase.ABORTED, X.PREPARED, X.PREPARED, X.PREPARED),
}


def state_at(place: Place) -> State:
    desired = D2 if place.phase in (A, Phase.COMMITTED) and place.had_go else D1
    decision = {S: Decision.NONE, A: Decision.NONE, Phase.COMMITTED: Decision.COMMIT}.get(place.phase, Decision.ABORT)
    go_of = {X.APPLYING, X.APPLIED, X.RESTORING, X.RESTORED}
    members = {
        "r0": Member("r0", ("n0",), 0, D1, place.canary, Ticket(EPOCH, 10) if place.canary in go_of else None),
        "r1": Member("r1", ("n1",), place.wave, D1, place.me, TICKET if place.had_go else None),
        "r2": Member("r2", ("n2",), 1, D1, place.companion, OTHER if place.companion in go_of else None),
    }
    update = UpdateRecord(
        id="m.1",
        model="m",
        kind=Kind.FLEET,
        target="v2",
        target_digest=D2,
        base="v1",
        options=Options(failure_policy=place.policy, max_failed="2"),
        members=members,
        phase=place.phase,
        decision=decision,
        wave=max((m.wave for m in members.values() if m.outcome in go_of), default=0),
    )
    committed = place.phase is Phase.COMMITTED
    preparing = {name: m.ticket or _ticket_of(name) for name, m in members.items() if m.outcome is X.STAGING}
    staged = {(f"n{i}", d) for i in range(3) for d in (D1, D2) if place.staged or i == 0}
    effort = Effort(
        deadline_at=SOON,
        asked=frozenset((f"n{i}", d) for i in range(3) for d in (D1, D2)),
        staged=frozenset(staged),
        preparing=preparing if place.staged else {},
        due={name: SOON for name, m in members.items() if m.ticket},
    )
    return State(
        epoch=EPOCH,
        led_at=0.0,
        models={"m": ModelRecord("m", committed="v2" if committed else "v1", next_sequence=3, next_update=2)},
        versions={
            ("m", "v1"): VersionRecord("m", "v1", 1, D1, 10, 1, 1, 0.0, available_once=True),
            ("m", "v2"): VersionRecord("m", "v2", 2, D2, 10, 1, 1, 0.0, available_once=True),
        },
        updates={"m.1": update},
        replicas={
            "r0": ReplicaRecord("r0", "m", D2 if committed else D1),
            "r1": ReplicaRecord("r1", "m", desired, excluded=place.me is X.EXCLUDED),
            "r2": ReplicaRecord("r2", "m", D2 if committed else D1),
        },
        seats={name: seat_of(name, place, members[name]) for name in members},
        nodes={
            f"n{i}": Node(f"n{i}", f"s-n{i}", "life", f"tcp://n{i}", frozenset({D1, D2}), NOW + 10, pins_told=None)
            for i in range(3)
        },
        efforts={"m.1": effort} if update.phase.is_open else {},
        next_number=100,
    )


def _ticket_of(name: str) -> Ticket:
    return Ticket(EPOCH, 10 + int(name[1:]))


def seat_of(name: str, place: Place, member: Member) -> Seat:
    serves_target = member.outcome is X.APPLIED
    return Seat(
        id=name,
        model="m",
        session=f"s-{name}",
        incarnation="life",
        nodes=member.nodes,
        ranks=((0, member.nodes[0], 1),),
        active=D2 if serves_target else D1,
        identifying=False,
        open_window="",
        engine="",
        lease_until=NOW + 10,
        connected=not (place.away and name == ME),
    )


# What can be said of `r1`. Every report also comes stale, doubled or from somebody else.

ME_NOW = (NOW, ME, SESSION)
Reports = Callable[[tuple[float, str, str], str, Ticket], e.Event]
REPORTS: dict[str, Reports] = {
    "prepared": lambda who, update, ticket: e.Prepared(*who, update, ticket, D1),
    "prepare failed": lambda who, update, ticket: e.PrepareFailed(*who, update, ticket, "no room"),
    "applied": lambda who, update, ticket: e.Applied(*who, update, ticket, D2, WINDOW),
    "applied, serves the base": lambda who, update, ticket: e.Applied(*who, update, ticket, D1, WINDOW),
    "failed": lambda who, update, ticket: e.ApplyFailed(*who, update, ticket, "shapes", D1),
    "torn": lambda who, update, ticket: e.ApplyFailed(*who, update, ticket, "silent", D1, torn=True),
    "refused": lambda who, update, ticket: e.OrderRefused(*who, update, ticket, "busy"),
}


def hello(session: str = "s-new", life: str = "life", active: str = D1, window: str = "") -> e.ReplicaAttached:
    return e.ReplicaAttached(NOW, ME, session, life, "m", None, ((0, "n1", 1),), active, open_window=window)


OTHER_EVENTS: dict[str, tuple[e.Event, ...]] = {
    "staged": (e.Staged(NOW, "n1", "s-n1", "m.1", D2),),
    "staging failed": (e.StageFailed(NOW, "n1", "s-n1", "m.1", D2, "disk"),),
    "node refused": (e.OrderRefused(NOW, "n1", "s-n1", "m.1", Ticket(EPOCH, 3), "full"),),
    "beat": (e.Beat(*ME_NOW),),
    "left": (e.Left(*ME_NOW),),
    "time passed": (e.Ticked(NOW),),
    "cancelled": (e.CancelAsked(NOW, "m.1"),),
    "reconnected": (hello(),),
    "reconnected in its window": (hello(window="m.1"),),
    "reconnected on the target": (hello(active=D2),),
    "restarted": (e.Left(*ME_NOW), hello(life="next life")),
}


@dataclass(frozen=True)
class Moved:
    """What is different after a move; `told` is told to `r1`. None is not looked at."""

    phase: Phase
    me: Outcome
    told: tuple[type, ...] = ()
    excluded: bool | None = None
    desired: str | None = None
    catch_up: bool = False


BACK = Moved(B, X.FAILED)
ABORTED = Moved(Phase.ABORTED, X.FAILED, (o.End,))
GOES_BACK = (o.Apply,)
LEFT_BEHIND = Moved(A, X.EXCLUDED, excluded=True, desired=D1)

MOVES: dict[tuple[str, str], Moved] = {
    # Staging: what is lacking comes, or the update ends with nobody applied.
    ("staging, unstaged", "staged"): Moved(S, X.STAGING),
    ("staging, unstaged", "staging failed"): ABORTED,
    # What it would go back to is another image now.
    ("staging, unstaged", "reconnected on the target"): Moved(S, X.STAGING),
    ("staging, unstaged", "node refused"): ABORTED,
    ("staging, unstaged", "cancelled"): replace(ABORTED, me=X.STAGING),
    ("staging, preparing", "prepared"): Moved(S, X.PREPARED),
    ("staging, preparing", "prepare failed"): ABORTED,
    ("staging, preparing", "refused"): ABORTED,
    ("staging, preparing", "staging failed"): ABORTED,
    ("staging, preparing", "node refused"): ABORTED,
    ("staging, preparing", "cancelled"): replace(ABORTED, me=X.STAGING),
    ("staging, preparing, evict", "prepared"): Moved(S, X.PREPARED),
    ("staging, preparing, evict", "prepare failed"): Moved(S, X.EXCLUDED, excluded=True),
    ("staging, preparing, evict", "refused"): Moved(S, X.EXCLUDED, excluded=True),
    ("staging, preparing, evict", "staging failed"): Moved(S, X.EXCLUDED, excluded=True),
    ("staging, preparing, evict", "node refused"): Moved(S, X.EXCLUDED, excluded=True),
    ("staging, preparing, evict", "cancelled"): replace(ABORTED, me=X.STAGING),
    ("staging, prepared", "cancelled"): replace(ABORTED, me=X.PREPARED),
    ("staging, excluded", "cancelled"): replace(ABORTED, me=X.EXCLUDED),
    # Applying.
    ("applying, preparing", "prepared"): Moved(A, X.APPLYING, (o.Apply,), desired=D2),
    ("applying, preparing", "prepare failed"): BACK,
    ("applying, preparing", "refused"): BACK,
    ("applying, preparing", "staging failed"): BACK,
    ("applying, preparing", "node refused"): BACK,
    ("applying, preparing", "cancelled"): Moved(B, X.STAGING),
    ("applying, waiting", "cancelled"): Moved(B, X.PREPARED),
    ("applying, applying", "applied"): Moved(A, X.APPLIED, desired=D2),
    ("applying, applying", "applied, serves the base"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, applying", "failed"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, applying", "refused"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, applying", "torn"): Moved(B, X.TORN, desired=D1),
    ("applying, applying", "cancelled"): Moved(B, X.APPLYING, desired=D1),
    ("applying, applying", "reconnected on the target"): Moved(A, X.APPLIED, desired=D2),
    ("applying, applying", "restarted"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, applying, evict", "applied"): Moved(A, X.APPLIED, desired=D2),
    ("applying, applying, evict", "applied, serves the base"): LEFT_BEHIND,
    ("applying, applying, evict", "failed"): LEFT_BEHIND,
    ("applying, applying, evict", "refused"): LEFT_BEHIND,
    ("applying, applying, evict", "torn"): replace(LEFT_BEHIND, me=X.TORN),
    ("applying, applying, evict", "cancelled"): Moved(B, X.APPLYING, desired=D1),
    ("applying, applying, evict", "reconnected on the target"): Moved(A, X.APPLIED, desired=D2),
    ("applying, applying, evict", "restarted"): LEFT_BEHIND,
    ("applying, applied", "cancelled"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, excluded", "cancelled"): Moved(B, X.RESTORING, GOES_BACK, desired=D1),
    ("applying, torn", "cancelled"): Moved(B, X.TORN, desired=D1),
    # Rolling back: an open GO is waited for, then taken back; an open way back is waited for.
    ("back, applying", "applied"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applying", "applied, serves the base"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applying", "failed"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applying", "refused"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applying", "torn"): Moved(B, X.TORN),
    ("back, applying", "reconnected on the target"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applying", "restarted"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applied, away", "reconnected"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applied, away", "reconnected in its window"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applied, away", "reconnected on the target"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, applied, away", "restarted"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, failed, away", "reconnected"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, failed, away", "reconnected in its window"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, failed, away", "reconnected on the target"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, failed, away", "restarted"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, restoring", "applied, serves the base"): Moved(B, X.RESTORED),
    # It serves the target still: it is told again.
    ("back, restoring", "applied"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, restoring", "failed"): Moved(B, X.DIVERGED),
    ("back, restoring", "refused"): Moved(B, X.DIVERGED),
    ("back, restoring", "torn"): Moved(B, X.TORN),
    # The order may have been lost with the stream.
    ("back, restoring", "reconnected"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, restoring", "reconnected on the target"): Moved(B, X.RESTORING, GOES_BACK),
    ("back, restoring", "restarted"): Moved(B, X.RESTORING, GOES_BACK),
}
# Preparing is asked anew of whoever connected anew: the one thing told that changes no record.
for place in ("staging, preparing", "staging, preparing, evict", "applying, preparing"):
    for how in ("reconnected", "reconnected in its window", "reconnected on the target", "restarted"):
        phase = PLACES[place].phase
        MOVES[place, how] = Moved(phase, X.STAGING, (o.Prepare,))
for how in ("reconnected", "reconnected in its window", "reconnected on the target", "restarted"):
    MOVES["staging, prepared", how] = Moved(S, X.STAGING, (o.Prepare,))
    # Its wave has not come: it is asked then.
    MOVES["applying, waiting", how] = Moved(A, X.STAGING)
    MOVES["back, never had GO", how] = Moved(B, X.STAGING)

EVENTS = {**{name: (report(ME_NOW, "m.1", TICKET),) for name, report in REPORTS.items()}, **OTHER_EVENTS}
# It serves what the model is not committed to: it gets an update of its own.
CAUGHT_UP = (o.Prepare,)
for place in ("rolled back", "aborted"):
    for how in ("reconnected on the target", "applied"):
        MOVES[place, how] = Moved(PLACES[place].phase, PLACES[place].me, CAUGHT_UP, desired=D1, catch_up=True)
late = ("applied, serves the base", "failed", "torn")
for how in ("reconnected", "reconnected in its window", "restarted", *late):
    MOVES["committed", how] = Moved(Phase.COMMITTED, X.APPLIED, CAUGHT_UP, desired=D2, catch_up=True)
UNMOVED = [(place, event) for place in PLACES for event in EVENTS if (place, event) not in MOVES]


def stepped(state: State, events: tuple[e.Event, ...]) -> tuple[State, tuple[o.Order, ...]]:
    said: tuple[o.Order, ...] = ()
    for event in events:
        state, more = step(state, event)
        said += more
    return state, said


def unchanged(state: State, events: tuple[e.Event, ...]) -> bool:
    """Whether no record changes, and no one is told anything but which images to keep."""
    after, said = stepped(state, events)
    durable = (after.models, after.versions, after.updates, after.replicas)
    told = [order for order in said if isinstance(order, o.Tell) and not isinstance(order.action, o.Pin)]
    return durable == (state.models, state.versions, state.updates, state.replicas) and not told


@pytest.mark.parametrize(("place", "event"), MOVES)
def test_the_event_moves_the_update(place: str, event: str) -> None:
    moved = MOVES[place, event]
    after, said = stepped(state_at(PLACES[place]), EVENTS[event])
    update, record = after.updates["m.1"], after.replicas[ME]
    told = [type(order.action) for order in said if isinstance(order, o.Tell) and order.member == ME]
    assert update.phase is moved.phase
    assert update.members[ME].outcome is moved.me
    assert told == list(moved.told) or (moved.catch_up and told == [])
    assert ("m.2" in after.updates) is moved.catch_up
    assert moved.excluded in (None, record.excluded)
    assert moved.desired in (None, record.desired)
    decided = {S: Decision.NONE, A: Decision.NONE, Phase.COMMITTED: Decision.COMMIT}
    assert update.decision is decided.get(update.phase, Decision.ABORT)


@pytest.mark.parametrize(("place", "event"), UNMOVED)
def test_the_event_changes_nothing(place: str, event: str) -> None:
    state = state_at(PLACES[place])
    if (place, event) == ("committed", "cancelled"):
        with pytest.raises(Declined, match="roll back instead"):
            stepped(state, EVENTS[event])
    else:
        assert unchanged(state, EVENTS[event])


STALE: dict[str, Callable[[Reports], e.Event]] = {
    "another number": lambda report: report(ME_NOW, "m.1", Ticket(EPOCH, 12)),
    "the epoch before": lambda report: report(ME_NOW, "m.1", Ticket(EPOCH - 1, 11)),
    "a later epoch": lambda report: report(ME_NOW, "m.1", Ticket(EPOCH + 1, 11)),
    "another update": lambda report: report(ME_NOW, "m.9", TICKET),
    "a replaced session": lambda report: report((NOW, ME, "s-older"), "m.1", TICKET),
    "another replica": lambda report: report((NOW, "r0", "s-r0"), "m.1", TICKET),
    "a node": lambda report: report((NOW, "n1", "s-n1"), "m.9", TICKET),
}


@pytest.mark.parametrize("why", STALE)
@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_report_changes_nothing_with(place: str, report: str, why: str) -> None:
    state, event = state_at(PLACES[place]), STALE[why](REPORTS[report])
    if PLACES[place].phase.is_open:
        assert unchanged(state, (event,))
    else:
        # What it says of the replica may be news, and start a catch-up; what is over stays as it is.
        after, _ = step(state, event)
        assert after.updates["m.1"] == state.updates["m.1"]
        assert after.models["m"].committed == state.models["m"].committed


@pytest.mark.parametrize(("place", "event"), [pair for pair in MOVES if pair[1] in REPORTS])
def test_a_doubled_report_changes_nothing(place: str, event: str) -> None:
    after, _ = stepped(state_at(PLACES[place]), EVENTS[event])
    assert unchanged(after, EVENTS[event])


OPEN = [name for name, place in PLACES.items() if place.phase.is_open]


@pytest.mark.parametrize("place", OPEN)
def test_time_alone_ends_the_update_when_all_are_silent(place: str) -> None:
    state, now = state_at(PLACES[place]), NOW
    for _ in range(400):
        now += 10
        state, _ = step(state, e.Ticked(now))
    assert_ended_without(state, "r1", "r2")


@pytest.mark.parametrize("place", OPEN)
def test_time_alone_ends_the_update_when_all_are_alive_and_none_answers(place: str) -> None:
    state, now = state_at(PLACES[place]), NOW
    for _ in range(600):
        now += 5
        for name in ("r0", "r1", "r2", "n0", "n1", "n2"):
            state, _ = step(state, e.Beat(now, name, f"s-{name}"))
        state, _ = step(state, e.Ticked(now))
    assert_ended_without(state, "r1", "r2")


def assert_ended_without(state: State, *silent: str) -> None:
    """Not committed; or, where failures are left behind, none of the silent counts as applied."""
    update = state.updates["m.1"]
    assert not update.phase.is_open
    if update.phase is Phase.COMMITTED:
        assert update.options.failure_policy is EVICT
        assert {update.members[name].outcome for name in silent} <= {X.EXCLUDED, X.TORN}
