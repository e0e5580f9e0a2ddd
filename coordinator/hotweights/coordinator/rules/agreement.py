"""Whether replicas that serve the same version have the same installed: fingerprints, rank by rank.

    replicas of a model, of one kind, that serve the digest and gave as many fingerprints

       rank   0   1   2
       a      x   y   z
       b      x   Q   z    <-- rank 1 of b: most have y
       c      x   y   z

Which of two is right nobody knows; of three or more, those that have another fingerprint than most are named.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hotweights.coordinator.rules.orders import NoteKind
from hotweights.coordinator.rules.records import Member, Outcome, UpdateRecord
from hotweights.coordinator.rules.state import Seat
from hotweights.coordinator.rules.turn import Turn

NAMES_MAX = 5
# Of a member that reported on the update's own doing.
_REPORTED = {Outcome.APPLIED, Outcome.RESTORED}


@dataclass(frozen=True)
class Difference:
    """What a replica has at one of its ranks is not what others have there."""

    replica: str
    reason: str


def differences(turn: Turn, update: UpdateRecord, digest: str) -> list[Difference]:
    """Among those that serve the digest, where a member that reported is one of them; a replica is named once."""
    told = {(seat.fingerprint_kind, seat.fingerprints) for seat in turn.seats.values() if seat.active == digest}
    if len(told) < 2:
        return []  # looked at after every report: the way of a fleet that agrees is short
    groups: dict[tuple[str, int], list[Seat]] = {}
    for seat in turn.seats.values():
        if seat.active == digest and seat.model == update.model and _counts(turn, update, seat):
            groups.setdefault((seat.fingerprint_kind, len(seat.fingerprints)), []).append(seat)
    named: dict[str, Difference] = {}
    for seats in groups.values():
        if len({seat.fingerprints for seat in seats}) > 1 and any(_reported(update.members, seat) for seat in seats):
            for difference in _between(seats, update.members):
                named.setdefault(difference.replica, difference)
    return list(named.values())


def note_differences(turn: Turn, update: UpdateRecord, digest: str) -> list[Difference]:
    """Finds them, and puts each into the log."""
    found = differences(turn, update, digest)
    for difference in found:
        turn.note_update(NoteKind.REPLICA_FAILED, update, difference.reason, replica=difference.replica)
    return found


def doubt_restored(turn: Turn, update: UpdateRecord) -> UpdateRecord:
    """Who is back with another fingerprint than others have has diverged; the end of the update waits for nothing."""
    bases = {m.base for m in update.members.values() if m.outcome is Outcome.RESTORED}
    for digest in sorted(bases):
        for difference in note_differences(turn, update, digest):
            member = update.members.get(difference.replica)
            if member is not None and member.outcome is Outcome.RESTORED:
                turn.put_member(update.id, replace(member, outcome=Outcome.DIVERGED, reason=difference.reason))
    return turn.updates[update.id]


def _counts(turn: Turn, update: UpdateRecord, seat: Seat) -> bool:
    """What serves at one that is out of contact is not known, unless this update put it there."""
    if not seat.active or not seat.fingerprint_kind or not seat.fingerprints:
        return False
    return _reported(update.members, seat) or not turn.seat_lost(update.model, seat.id)


def _reported(members: Mapping[str, Member], seat: Seat) -> bool:
    member = members.get(seat.id)
    return member is not None and member.outcome in _REPORTED


def _between(seats: list[Seat], members: Mapping[str, Member]) -> Iterator[Difference]:
    for rank in range(len(seats[0].fingerprints)):
        held = Counter(seat.fingerprints[rank] for seat in seats)
        if len(held) == 1:
            continue
        (most, count), (_, second) = held.most_common(2)
        if count > second:
            others = [seat.id for seat in seats if seat.fingerprints[rank] == most]
            for seat in seats:
                if seat.fingerprints[rank] != most:
                    yield Difference(seat.id, _reason(seat, rank, others))
        else:
            odd = max(seats, key=lambda seat: _told_at(members, seat))
            others = [seat.id for seat in seats if seat.fingerprints[rank] != odd.fingerprints[rank]]
            yield Difference(odd.id, f"{_reason(odd, rank, others)}; either may be wrong")


def _told_at(members: Mapping[str, Member], seat: Seat) -> tuple[int, int]:
    """Where as many have the one as the other, the last one that the update wrote is named."""
    ticket = members[seat.id].ticket if _reported(members, seat) else None
    return (ticket.epoch, ticket.number) if ticket is not None else (0, 0)


def _reason(seat: Seat, rank: int, others: list[str]) -> str:
    index, node, _ = seat.ranks[rank] if rank < len(seat.ranks) else (rank, seat.nodes[0], 0)
    names = ", ".join(sorted(others)[:NAMES_MAX])
    more = f" and {len(others) - NAMES_MAX} more" if len(others) > NAMES_MAX else ""
    what = "replica" if len(others) == 1 else "replicas"
    return (
        f"rank {index} of replica {seat.id} on node {node} has another fingerprint than {what} {names}{more} "
        "for the same version"
    )
