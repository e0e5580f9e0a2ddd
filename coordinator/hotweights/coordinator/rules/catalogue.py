"""Versions, policies, and what starts by itself."""

from dataclasses import replace

from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.orders import Declined, NoteKind, Pin
from hotweights.coordinator.rules.records import (
    Kind,
    Member,
    ModelRecord,
    Options,
    Policy,
    UpdateRecord,
    VersionRecord,
)
from hotweights.coordinator.rules.state import Seat
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.update import SUPERSEDED, abort, cancel
from hotweights.coordinator.rules.waves import check_options, plan_waves
from hotweights.coordinator.rules.windows import any_window_out

ENDED_UPDATES_MAX = 100
NAME_LENGTH_MAX = 200


def published(turn: Turn, event: e.VersionPublished) -> None:
    """Versions are immutable: the same again is fine, other content under the name is not."""
    check_name("model", event.model)
    check_name("version", event.name)
    check_options(event.options)
    present = turn.versions.get((event.model, event.name))
    if present is not None:
        _same_again(turn, present, event)
        return
    model = turn.models.get(event.model) or ModelRecord(event.model)
    version = VersionRecord(
        model=event.model,
        name=event.name,
        sequence=model.next_sequence,
        digest=event.digest,
        image_bytes=event.image_bytes,
        tensor_count=event.tensor_count,
        bucket_count=event.bucket_count,
        published_at=event.now,
        available_once=bool(turn.holders(event.digest)),
        start=event.start,
        options=event.options,
    )
    turn.models.put(event.model, replace(model, next_sequence=model.next_sequence + 1))
    turn.versions.put((event.model, event.name), version)
    turn.note(
        NoteKind.VERSION_PUBLISHED,
        f"{event.model} {event.name} published, {event.image_bytes / 1e6:.1f} MB",
        model=event.model,
        version=event.name,
    )
    _drop_oldest(turn, event.model)
    turn.touch(event.model)


def _same_again(turn: Turn, present: VersionRecord, event: e.VersionPublished) -> None:
    if present.digest != event.digest:
        raise Declined(
            "ALREADY_EXISTS",
            "VERSION_EXISTS",
            f"{event.model} {event.name} exists with digest {present.digest}, "
            f"not {event.digest}: versions are immutable, choose another name",
            existing_digest=present.digest,
            offered_digest=event.digest,
        )
    model, under_way = turn.models[event.model], turn.open_fleet_update(event.model)
    begun = event.name in (model.committed, under_way.target if under_way else "")
    if event.start and not present.start and not begun:
        again = replace(present, start=True, options=event.options)
        turn.versions.put((event.model, event.name), again)
        turn.touch(event.model)


def check_name(what: str, name: str) -> None:
    """Names go into files, ids and terminals. Raises Declined."""
    plain = name and len(name) <= NAME_LENGTH_MAX and all(c.isalnum() or c in "._-/+:@" for c in name)
    if not plain or not name.isascii():
        raise Declined(
            "INVALID_ARGUMENT",
            "BAD_NAME",
            f"{what} {name[:NAME_LENGTH_MAX]!r}: use letters, digits and ._-/+:@, 1 to 200 of them",
        )


def deleted(turn: Turn, event: e.VersionDeleted) -> None:
    version = version_named(turn, event.model, event.name)
    if (pin := _pinned_by(turn, version)) != "":
        raise Declined(
            "FAILED_PRECONDITION",
            "VERSION_PINNED",
            f"{event.model} {event.name} is in use: {pin}",
        )
    _drop(turn, version)


def _drop(turn: Turn, version: VersionRecord) -> None:
    turn.versions.drop((version.model, version.name))
    turn.note(
        NoteKind.VERSION_DELETED,
        f"{version.model} {version.name} deleted",
        model=version.model,
        version=version.name,
    )
    turn.touch(version.model)


def _drop_oldest(turn: Turn, model: str) -> None:
    """Beyond `keep_versions` the oldest go, never one that is pinned."""
    keep = turn.limits.keep_versions
    if keep <= 0:
        return
    versions = sorted((v for v in turn.versions.values() if v.model == model), key=lambda v: v.sequence)
    for version in versions[:-keep]:
        if _pinned_by(turn, version) == "":
            _drop(turn, version)


def _pinned_by(turn: Turn, version: VersionRecord) -> str:
    """Why a version cannot go; empty when it can."""
    model = turn.models[version.model]
    if model.committed == version.name:
        return "it is the committed version"
    if model.history[:1] == (version.name,):
        return "it is the version a rollback goes to"
    for update in turn.open_updates(version.model):
        if version.name in (update.target, update.base):
            return f"update {update.id} is open"
    for seat in turn.seats.values():
        if seat.model == version.model and seat.active == version.digest:
            return f"replica {seat.id} serves it"
    return ""


def version_named(turn: Turn, model: str, name: str) -> VersionRecord:
    """The version; empty name is the newest. Raises Declined."""
    known = [v for v in turn.versions.values() if v.model == model]
    if not known:
        models = ", ".join(sorted({v.model for v in turn.versions.values()})) or "none"
        raise Declined(
            "NOT_FOUND",
            "MODEL_UNKNOWN",
            f"no version of model {model!r} is published; models with versions: {models}",
        )
    if not name:
        return max(known, key=lambda v: v.sequence)
    version = turn.versions.get((model, name))
    if version is None:
        names = ", ".join(v.name for v in sorted(known, key=lambda v: -v.sequence)[:5])
        raise Declined("NOT_FOUND", "VERSION_UNKNOWN", f"{model} has no version {name!r}; the newest: {names}")
    return version


# Updates.


def update_asked(turn: Turn, event: e.UpdateAsked) -> None:
    if event.kind is not Kind.ROLLBACK:
        version = version_named(turn, event.model, event.version)
        start_update(turn, version, event.kind, event.options)
        return
    target = _way_back(turn, event)
    update = start_update(turn, target, event.kind, event.options)
    turn.models.put(event.model, replace(turn.models[update.model], held=True))


def _way_back(turn: Turn, event: e.UpdateAsked) -> VersionRecord:
    if event.version:
        return version_named(turn, event.model, event.version)
    model = turn.models.get(event.model)
    retained = [v for v in model.history if (event.model, v) in turn.versions] if model else []
    if not retained:
        version_named(turn, event.model, "")
        raise Declined(
            "FAILED_PRECONDITION",
            "NO_WAY_BACK",
            f"{event.model} has no version that was committed before the present one",
        )
    return turn.versions[(event.model, retained[0])]


def start_update(turn: Turn, target: VersionRecord, kind: Kind, options: Options) -> UpdateRecord:
    """Freezes the roster. Raises Declined when there is nothing to do or no way to do it."""
    roster = check_start(turn, target, options)
    for update in turn.open_updates(target.model):
        if not any_window_out(turn, update):
            abort(turn, update, SUPERSEDED)
    model = turn.models[target.model]
    waves = plan_waves([seat.id for seat in roster], options, _unready(turn, target.model))
    wave_of = {name: wave for wave, names in enumerate(waves) for name in names}
    members = {s.id: Member(s.id, s.nodes, wave_of[s.id], s.active) for s in roster}
    return _open(turn, target, kind, options, members, model.committed or base_of(turn, roster))


def _open(
    turn: Turn,
    target: VersionRecord,
    kind: Kind,
    options: Options,
    members: dict[str, Member],
    base: str,
) -> UpdateRecord:
    model = turn.models[target.model]
    update = UpdateRecord(
        id=f"{model.name}.{model.next_update}",
        model=model.name,
        kind=kind,
        target=target.name,
        target_digest=target.digest,
        base=base,
        options=options,
        members=members,
        started_at=turn.now,
    )
    tried = max(model.tried_sequence, target.sequence)
    turn.models.put(model.name, replace(model, next_update=model.next_update + 1, tried_sequence=tried))
    if kind is not Kind.CATCH_UP:
        _forget_starts(turn, target, kind)
    turn.put_update(update)
    what = "rollback" if kind is Kind.ROLLBACK else kind.value
    turn.note_update(
        NoteKind.UPDATE_STARTED,
        update,
        f"{update.id}: {what} from {base or 'unversioned'} to {target.name}, {len(members)} replicas",
    )
    _forget_old_updates(turn, model.name)
    turn.touch(model.name)
    return update


def _forget_starts(turn: Turn, target: VersionRecord, kind: Kind) -> None:
    """A start that waits is overtaken by this one, and by going back: nothing older begins by itself afterwards."""
    for key, version in list(turn.versions.items()):
        overtaken = kind is Kind.ROLLBACK or version.sequence <= target.sequence
        if version.model == target.model and version.start and overtaken:
            turn.versions.put(key, replace(version, start=False))


def _forget_old_updates(turn: Turn, model: str) -> None:
    ended = [u for u in turn.updates.values() if u.model == model and not u.phase.is_open]
    for update in sorted(ended, key=lambda u: u.started_at)[:-ENDED_UPDATES_MAX]:
        turn.updates.drop(update.id)


def check_start(turn: Turn, target: VersionRecord, options: Options) -> list[Seat]:
    """The roster an update would have. Raises Declined, each with its reason."""
    check_options(options)
    model = turn.models[target.model]
    open_one = turn.open_fleet_update(target.model)
    if open_one is not None:
        raise Declined(
            "FAILED_PRECONDITION",
            "UPDATE_OPEN",
            f"update {open_one.id} to {open_one.target} is open; cancel it or wait for its end",
            update=open_one.id,
        )
    if model.committed == target.name:
        raise Declined(
            "FAILED_PRECONDITION",
            "ALREADY_COMMITTED",
            f"{target.model} is committed to {target.name} already",
        )
    roster = [
        seat
        for seat in turn.seats.values()
        if seat.model == target.model and seat.connected and not turn.replicas[seat.id].excluded
    ]
    if not roster:
        raise Declined(
            "FAILED_PRECONDITION",
            "NO_REPLICA",
            f"no replica of {target.model} is attached; start an engine with HOTWEIGHTS_ENDPOINT",
        )
    serving = all(seat.active == target.digest for seat in roster)
    if not serving and not turn.holders(target.digest):
        raise Declined(
            "FAILED_PRECONDITION",
            "NO_SOURCE",
            f"no attached node holds {target.model} {target.name}; publish its folder again",
        )
    return sorted(roster, key=lambda seat: seat.id)


def base_of(turn: Turn, roster: list[Seat]) -> str:
    """Before the first commit: the version that all replicas serve, if it is one."""
    digests = {seat.active for seat in roster}
    if len(digests) != 1:
        return ""
    return turn.version_of(roster[0].model, digests.pop())


def _unready(turn: Turn, model: str) -> int:
    """Replicas that count as unavailable before the update begins."""
    return sum(
        1
        for record in turn.replicas.values()
        if record.model == model
        and record.desired
        and (seat := turn.seats.get(record.id)) is not None
        and (not seat.connected or seat.active != record.desired)
    )


def cancel_asked(turn: Turn, event: e.CancelAsked) -> None:
    update = turn.updates.get(event.update)
    if update is None:
        raise Declined("NOT_FOUND", "UPDATE_UNKNOWN", f"there is no update {event.update!r}")
    cancel(turn, update)


def policy_set(turn: Turn, event: e.PolicySet) -> None:
    check_name("model", event.model)
    model = turn.models.get(event.model) or ModelRecord(event.model)
    turn.models.put(event.model, replace(model, policy=event.policy))
    turn.note(NoteKind.MODEL_POLICY, f"{event.model}: policy {event.policy.value}", model=event.model)
    turn.touch(event.model)


def resumed(turn: Turn, event: e.ModelResumed) -> None:
    """Lifts the hold of a rollback; `auto` looks at the newest version again."""
    model = turn.models.get(event.model)
    if model is None:
        version_named(turn, event.model, "")
        return
    turn.models.put(event.model, replace(model, held=False, tried_sequence=0))
    turn.note(NoteKind.MODEL_POLICY, f"{event.model}: resumed", model=event.model)
    turn.touch(event.model)


def undrained(turn: Turn, event: e.ReplicaUndrained) -> None:
    record = turn.replicas.get(event.replica)
    if record is None:
        raise Declined("NOT_FOUND", "REPLICA_UNKNOWN", f"there is no replica {event.replica!r}")
    turn.replicas.put(record.id, replace(record, excluded=False, failures=0, retry_at=0.0))
    turn.touch(record.model)


# What starts by itself.


def begin_what_is_due(turn: Turn, model_name: str) -> None:
    """A version that waits for its start, `auto`, and replicas that lag behind."""
    model = turn.models.get(model_name)
    if model is None or turn.open_fleet_update(model_name) is not None:
        return
    target = _due(turn, model)
    if target is not None:
        try:
            start_update(turn, target, Kind.FLEET, target.options)
        except Declined:
            pass  # Not yet: nobody attached, or no source. It is looked at again.
        else:
            return
    for record in list(turn.replicas.values()):
        if record.model == model_name:
            _catch_up(turn, turn.models[model_name], record.id)


def _due(turn: Turn, model: ModelRecord) -> VersionRecord | None:
    """The newest version that was asked to start, or that `auto` has not tried."""
    versions = sorted(
        (v for v in turn.versions.values() if v.model == model.name),
        key=lambda v: v.sequence,
        reverse=True,
    )
    for version in versions:
        if version.start and version.name != model.committed:
            return version
    if model.policy is not Policy.AUTO or model.held or not versions:
        return None
    newest = versions[0]
    committed = turn.versions.get((model.name, model.committed))
    done = max(model.tried_sequence, committed.sequence if committed else 0)
    return newest if newest.sequence > done else None


def _catch_up(turn: Turn, model: ModelRecord, replica: str) -> None:
    """A late, restarted or lagging replica gets an update of its own to what is committed.

    Before the first commit that is what it should go back to, if it missed going back.
    """
    record, seat = turn.replicas[replica], turn.seats.get(replica)
    name = model.committed or turn.version_of(model.name, record.desired)
    version = turn.versions.get((model.name, name))
    if version is None or seat is None or not seat.connected or record.excluded:
        return
    if any(replica in update.members for update in turn.open_updates(model.name)):
        # An open update says what it should serve; one that goes back wants the base.
        return
    turn.desire(model.name, replica, version.digest)
    record = turn.replicas[replica]
    if seat.identifying or seat.active == version.digest or turn.now < record.retry_at:
        return
    if not turn.holders(version.digest):
        return
    member = Member(replica, seat.nodes, 0, seat.active)
    base = turn.version_of(model.name, seat.active)
    _open(turn, version, Kind.CATCH_UP, Options(), {replica: member}, base)


# Pins.


def tell_pins(turn: Turn) -> None:
    """Every node is told which images must stay, when that changes."""
    wanted: dict[str, set[str]] = {node.id: set() for node in turn.nodes.values()}
    for seat in turn.seats.values():
        committed = turn.digest_of(seat.model, turn.models[seat.model].committed)
        for node_id in seat.nodes:
            if node_id in wanted:
                wanted[node_id] |= {seat.active, committed} - {""}
    for update in turn.updates.values():
        if update.phase.is_open:
            for member in update.members.values():
                for node_id in member.nodes:
                    if node_id in wanted:
                        wanted[node_id] |= {update.target_digest, member.base} - {""}
    for node_id, digests in wanted.items():
        node = turn.nodes[node_id]
        pins = frozenset(digests)
        if node.connected and node.pins_told != pins:
            turn.nodes.put(node_id, replace(node, pins_told=pins))
            turn.tell(node, Pin(pins))
