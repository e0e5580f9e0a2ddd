"""Between the rules' records and the protocol's messages."""

import math
from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.timestamp_pb2 import Timestamp

from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules import records as r
from hotweights.coordinator.rules.orders import Declined
from hotweights.coordinator.rules.state import Node, Progress, Routes, Seat, State
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.service import bounds
from hotweights.v1 import fleet_pb2, model_pb2, update_pb2

E = TypeVar("E", bound=Enum)
_NOTHING = Progress(0, 0)

# Enum values travel by their names in the protocol, so that the numbers stay there.
PHASES = {phase: f"UPDATE_PHASE_{phase.name}" for phase in r.Phase}
KINDS = {kind: f"UPDATE_KIND_{kind.name}" for kind in r.Kind}
OUTCOMES = {outcome: f"REPLICA_OUTCOME_{outcome.name}" for outcome in r.Outcome}
FAILURE_POLICIES = {policy: f"FAILURE_POLICY_{policy.name}" for policy in r.FailurePolicy}
INFLIGHTS = {mode: f"INFLIGHT_{mode.name}" for mode in r.Inflight}
POLICIES = {policy: f"MODEL_POLICY_{policy.name}" for policy in r.Policy}
EVENT_KINDS = {kind: f"EVENT_KIND_{kind.name}" for kind in o.NoteKind}


def timestamp(seconds: float) -> Timestamp | None:
    """None for a time that has not come."""
    if seconds <= 0:
        return None
    fraction, whole = math.modf(seconds)
    return Timestamp(seconds=int(whole), nanos=int(fraction * 1e9))


def options_from(message: update_pb2.UpdateOptions) -> r.Options:
    """Zero values take the defaults. Raises Declined for an enum value this side does not know."""
    default = r.Options()
    return r.Options(
        failure_policy=_known(
            FAILURE_POLICIES, update_pb2.FailurePolicy, message.failure_policy, default.failure_policy
        ),
        inflight=_known(INFLIGHTS, update_pb2.Inflight, message.inflight, default.inflight),
        canary=message.canary or default.canary,
        max_unavailable=message.max_unavailable or default.max_unavailable,
        max_failed=message.max_failed or default.max_failed,
        staging_deadline_s=message.staging_deadline_s or default.staging_deadline_s,
        quiesce_deadline_s=message.quiesce_deadline_s or default.quiesce_deadline_s,
        apply_deadline_s=message.apply_deadline_s or default.apply_deadline_s,
        asleep_deadline_s=message.asleep_deadline_s or default.asleep_deadline_s,
        check_finite=message.check_finite,
    )


def policy_from(value: int) -> r.Policy | None:
    """None where the message leaves it open. Raises Declined for an unknown value."""
    return _known(POLICIES, model_pb2.ModelPolicy, value, None) if value else None


def _known(table: Mapping[E, str], numbers: EnumTypeWrapper, value: int, default: E | None) -> E:
    """The rules' value for a number of the protocol; 0 is the default."""
    if not value and default is not None:
        return default
    for key, name in table.items():
        if numbers.Value(name) == value:
            return key
    raise Declined("INVALID_ARGUMENT", "UNKNOWN_VALUE", f"{value} is no {numbers.DESCRIPTOR.name}")


def options_message(options: r.Options) -> update_pb2.UpdateOptions:
    return update_pb2.UpdateOptions(
        failure_policy=FAILURE_POLICIES[options.failure_policy],
        inflight=INFLIGHTS[options.inflight],
        canary=options.canary,
        max_unavailable=options.max_unavailable,
        max_failed=options.max_failed,
        staging_deadline_s=options.staging_deadline_s,
        quiesce_deadline_s=options.quiesce_deadline_s,
        apply_deadline_s=options.apply_deadline_s,
        asleep_deadline_s=options.asleep_deadline_s,
        check_finite=options.check_finite,
    )


def window_message(window: r.WindowTimes) -> update_pb2.WindowTimes:
    return update_pb2.WindowTimes(
        quiesce_ms=window.quiesce_ms,
        apply_ms=window.apply_ms,
        resume_ms=window.resume_ms,
        total_ms=window.total_ms,
    )


def window_from(message: update_pb2.WindowTimes) -> r.WindowTimes:
    return r.WindowTimes(message.quiesce_ms, message.apply_ms, message.resume_ms, message.total_ms)


def routes_message(routes: Routes) -> fleet_pb2.Routes:
    return fleet_pb2.Routes(
        direct_modules=routes.direct_modules,
        direct_bytes=routes.direct_bytes,
        assembled_modules=routes.assembled_modules,
        assembled_bytes=routes.assembled_bytes,
        reload_modules=routes.reload_modules,
        reload_bytes=routes.reload_bytes,
        reasons=routes.reasons,
        sources=routes.sources,
    )


def routes_from(message: fleet_pb2.Routes) -> Routes:
    return Routes(
        direct_modules=message.direct_modules,
        direct_bytes=message.direct_bytes,
        assembled_modules=message.assembled_modules,
        assembled_bytes=message.assembled_bytes,
        reload_modules=message.reload_modules,
        reload_bytes=message.reload_bytes,
        reasons=bounds.route_lines(message.reasons),
        sources=bounds.route_lines(message.sources),
    )


def model_message(state: State, model: r.ModelRecord) -> model_pb2.Model:
    opened = [
        u.id
        for u in state.updates.values()
        if u.model == model.name and u.phase.is_open and u.kind is not r.Kind.CATCH_UP
    ]
    return model_pb2.Model(
        name=model.name,
        policy=POLICIES[model.policy or r.Policy.MANUAL],
        held=model.held,
        committed_version=model.committed,
        open_update_id=opened[0] if opened else "",
    )


def version_message(state: State, version: r.VersionRecord) -> model_pb2.Version:
    holders = sorted(node.id for node in state.nodes.values() if node.connected and version.digest in node.held)
    if holders:
        availability = model_pb2.VERSION_STATE_AVAILABLE
    elif version.available_once:
        availability = model_pb2.VERSION_STATE_UNAVAILABLE
    else:
        availability = model_pb2.VERSION_STATE_DECLARED
    return model_pb2.Version(
        model=version.model,
        name=version.name,
        sequence=version.sequence,
        manifest_digest=bytes.fromhex(version.digest),
        image_bytes=version.image_bytes,
        tensor_count=version.tensor_count,
        bucket_count=version.bucket_count,
        state=availability,
        holder_node_ids=holders,
        published_at=timestamp(version.published_at),
    )


def update_message(state: State, update: r.UpdateRecord) -> update_pb2.Update:
    message = update_pb2.Update(
        id=update.id,
        model=update.model,
        kind=KINDS[update.kind],
        phase=PHASES[update.phase],
        base_version=update.base,
        target_version=update.target,
        options=options_message(update.options),
        reason=update.reason,
        wave=update.wave,
        wave_count=1 + max((m.wave for m in update.members.values()), default=-1),
        started_at=timestamp(update.started_at),
        ended_at=timestamp(update.ended_at),
    )
    for member in update.members.values():
        row = message.replicas.add(
            replica_id=member.replica,
            wave=member.wave,
            outcome=OUTCOMES[member.outcome],
            reason=member.reason,
        )
        if member.window is not None:
            row.window.CopyFrom(window_message(member.window))
    _add_progress(message, state, update)
    return message


def _add_progress(message: update_pb2.Update, state: State, update: r.UpdateRecord) -> None:
    effort = state.efforts.get(update.id)
    for node in sorted({node for m in update.members.values() for node in m.nodes}):
        now = effort.progress.get(node, _NOTHING) if effort else _NOTHING
        through = update.phase in (r.Phase.APPLYING, r.Phase.COMMITTED)
        staged = through or (effort is not None and (node, update.target_digest) in effort.staged)
        message.nodes.add(
            node_id=node,
            bytes_done=now.bytes_done,
            bytes_total=now.bytes_total,
            staged=staged,
            source_node_id="" if staged else now.source,
            bytes_per_s=0.0 if staged else now.bytes_per_s,
            wire_bytes=now.wire_bytes,
            transport=now.transport,
        )


def replica_message(state: State, record: r.ReplicaRecord) -> fleet_pb2.Replica:
    seat = state.seats.get(record.id)
    # A turn that changes nothing: the rules' own way of reading.
    turn = Turn(state, 0.0)
    message = fleet_pb2.Replica(
        id=record.id,
        model=record.model,
        excluded=record.excluded,
        desired_version=turn.version_of(record.model, record.desired),
    )
    if seat is not None:
        _add_seat(message, turn, record, seat)
    return message


def _add_seat(message: fleet_pb2.Replica, turn: Turn, record: r.ReplicaRecord, seat: Seat) -> None:
    message.connected = seat.connected
    message.ready = seat.connected and bool(seat.active) and seat.active == record.desired
    message.active_version = turn.version_of(record.model, seat.active)
    message.active_digest = bytes.fromhex(seat.active)
    message.fingerprints.extend(bytes.fromhex(text) for text in seat.fingerprints)
    message.fingerprint_kind = seat.fingerprint_kind
    message.engine = seat.engine
    message.note = seat.note
    for index, node, pid in seat.ranks:
        message.ranks.add(index=index, node_id=node, pid=pid)
    if seat.routes is not None:
        message.routes.CopyFrom(routes_message(seat.routes))
    if seat.window is not None:
        message.last_window.CopyFrom(window_message(seat.window))


def node_message(node: Node) -> fleet_pb2.Node:
    return fleet_pb2.Node(
        id=node.id,
        connected=node.connected,
        data_endpoint=node.endpoint,
        held_digests=[bytes.fromhex(digest) for digest in sorted(node.held)],
        stage_bytes_used=node.bytes_used,
        stage_bytes_free=node.bytes_free,
        quarantine=node.quarantine,
        zone=node.zone,
    )


def event_message(note: o.Note, revision: int) -> fleet_pb2.Event:
    message = fleet_pb2.Event(
        revision=revision,
        at=timestamp(note.at),
        kind=EVENT_KINDS[note.kind],
        model=note.model,
        version=note.version,
        update_id=note.update,
        replica_id=note.replica,
        node_id=note.node,
        message=note.message,
    )
    if note.window is not None:
        message.window.CopyFrom(window_message(note.window))
    if note.refusal is not None:
        message.refusal.CopyFrom(refusal_message(note.refusal))
    return message


def refusal_message(refusal: o.Refusal) -> fleet_pb2.Refusal:
    return fleet_pb2.Refusal(
        peer=refusal.peer,
        name=refusal.name,
        role=refusal.role,
        method=refusal.method,
        reason=refusal.reason,
        passed_over=refusal.passed_over,
    )
