"""How an update would go, without starting it."""

from hotweights.coordinator.rules.catalogue import base_of, check_start, version_named
from hotweights.coordinator.rules.chains import sources_of, zones_of
from hotweights.coordinator.rules.records import Options
from hotweights.coordinator.rules.state import Seat, State
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.rules.waves import plan_waves
from hotweights.v1 import manifest_pb2, update_pb2


def plan_update(state: State, now: float, model: str, version: str, options: Options) -> update_pb2.Plan:
    """The plan StartUpdate would follow now. Raises Declined for the reasons it would."""
    turn = Turn(state, now)
    target = version_named(turn, model, version)
    roster = check_start(turn, target, options)
    record = state.models[model]
    plan = update_pb2.Plan(
        model=model,
        base_version=record.committed or base_of(turn, roster),
        target_version=target.name,
    )
    for names in plan_waves([seat.id for seat in roster], options):
        plan.waves.add(replica_ids=names)
    holders = sorted(node.id for node in turn.holders(target.digest))
    nodes = {node for seat in roster for node in seat.nodes}
    chain, zones = sorted(nodes - set(holders)), zones_of(state.nodes.values())
    for node_id in sorted(nodes):
        row = plan.nodes.add(node_id=node_id)
        if node_id in holders:
            continue
        row.fetch_bytes, row.fetch_buckets = target.image_bytes, target.bucket_count
        row.source_node_ids.extend(sources_of(node_id, chain, holders, zones))
    plan.notes.extend(_notes(state, roster, target.image_bytes))
    if options.check_finite:
        plan.notes.append("every rank looks for NaN and infinite values while it prepares; one refuses the version")
    return plan


def add_unchanged(state: State, plan: update_pb2.Plan, base: str, unchanged_bytes: int) -> None:
    """Writes down what the nodes that hold the image `base` need not fetch for it."""
    for row in plan.nodes:
        node = state.nodes.get(row.node_id)
        if row.fetch_bytes and node is not None and base in node.held:
            row.unchanged_bytes = unchanged_bytes


def unchanged_bytes(target_blob: bytes, base_blob: bytes) -> int:
    """In buckets that two manifests have at the same place of the same file. Takes a second for the largest."""
    target, base = (manifest_pb2.Manifest.FromString(blob) for blob in (target_blob, base_blob))
    there = {(bucket.file, bucket.offset, bucket.size_bytes): bucket.digest for bucket in base.buckets}
    same = [b for b in target.buckets if there.get((b.file, b.offset, b.size_bytes)) == b.digest]
    return sum(bucket.size_bytes for bucket in same)


def _notes(state: State, roster: list[Seat], image_bytes: int) -> list[str]:
    notes = []
    unversioned = [seat.id for seat in roster if not seat.active]
    if unversioned:
        notes.append(
            f"{len(unversioned)} replicas serve weights that no image is known for "
            f"({', '.join(unversioned[:3])}); only copies kept in the window can take them back"
        )
    for node_id in sorted({node for seat in roster for node in seat.nodes}):
        node = state.nodes.get(node_id)
        if node is None:
            notes.append(f"node {node_id} has no agent yet")
        elif node.bytes_free < image_bytes:
            notes.append(
                f"node {node_id} has {node.bytes_free / 1e9:.2f} GB free in its stage; the image "
                f"takes {image_bytes / 1e9:.2f} GB: an image that is not pinned would have to go"
            )
    return notes
