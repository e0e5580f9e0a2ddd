"""`coord-status`: the whole state on one screen."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hotweights.cli.arguments import Subparsers, add_command, add_connection, add_model, count, seconds

if TYPE_CHECKING:
    from hotweights.cli.client import Coordinator
    from hotweights.cli.output import Table
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import fleet_pb2, model_pb2, update_pb2


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "coord-status", coord_status, "Show models, updates, nodes and replicas.", "status")
    add_model(parser, "default: all")
    parser.add_argument("--last", type=count, default=10, metavar="N", help="events to show, at most 100 (default: 10)")
    parser.add_argument("--watch", type=seconds, nargs="?", const=2.0, metavar="S", help="again every S seconds (2)")
    add_connection(parser)


async def coord_status(arguments: argparse.Namespace) -> int:
    import asyncio
    import sys

    from hotweights.cli.client import connect

    async with connect(arguments) as coordinator:
        while True:
            shown = await coordinator.status(arguments.model or "", arguments.last)
            if arguments.watch and sys.stdout.isatty() and not arguments.json:
                print("\x1b[H\x1b[2J", end="")  # home, and clear the screen
            _show(coordinator, shown, arguments)
            if not arguments.watch:
                return 0
            await asyncio.sleep(arguments.watch)


def _show(coordinator: "Coordinator", status: "pb.GetStatusResponse", arguments: argparse.Namespace) -> None:
    from hotweights.cli.output import print_json, print_json_line, print_tables

    if arguments.json:
        (print_json_line if arguments.watch else print_json)(status)
        return
    print(
        f"coordinator {coordinator.endpoint}  hotweights {status.software_version}  cluster {status.cluster_id[:8]}  "
        f"epoch {status.epoch}  revision {status.revision}"
    )
    updates = [table for update in status.updates for table in update_tables(update)]
    print_tables(
        model_table(status.models),
        version_table(status.versions, title="versions"),
        *updates,
        node_table(status.nodes),
        replica_table(status.replicas),
        *route_tables(status.replicas),
        event_table(status.events, title="last events"),
    )


def model_table(models: "Iterable[model_pb2.Model]") -> "Table":
    from hotweights.cli.output import Table, word
    from hotweights.v1 import model_pb2

    table = Table("models", ("MODEL", "POLICY", "HELD", "COMMITTED", "OPEN UPDATE"))
    for model in models:
        policy = word(model_pb2.ModelPolicy, model.policy)
        table.add(model.name, policy, "yes" if model.held else "no", model.committed_version, model.open_update_id)
    return table


def version_table(versions: "Iterable[model_pb2.Version]", title: str) -> "Table":
    from hotweights.cli.output import Table, moment, short, size, word
    from hotweights.v1 import model_pb2

    columns = ("MODEL", "VERSION", "STATE", "SIZE", "TENSORS", "BUCKETS", "HOLDERS", "DIGEST", "PUBLISHED")
    table = Table(title, columns)
    for version in versions:
        table.add(
            version.model,
            version.name,
            word(model_pb2.VersionState, version.state),
            size(version.image_bytes),
            version.tensor_count,
            version.bucket_count,
            ", ".join(version.holder_node_ids),
            short(version.manifest_digest),
            moment(version.published_at),
        )
    return table


def update_tables(update: "update_pb2.Update") -> "Iterable[Table]":
    from hotweights.cli.output import Table, moment, one_line, pause, size, word
    from hotweights.v1 import update_pb2

    is_applying = update.phase == update_pb2.UPDATE_PHASE_APPLYING
    wave = f", wave {update.wave + 1} of {update.wave_count}" if is_applying else ""
    kind = word(update_pb2.UpdateKind, update.kind)
    phase = word(update_pb2.UpdatePhase, update.phase)
    has_ended = update.HasField("ended_at")
    when = f"ended {moment(update.ended_at)}" if has_ended else f"started {moment(update.started_at)}"
    title = (
        f"update {update.id}: {kind} from {update.base_version or 'unversioned'} to {update.target_version}: "
        f"{phase}{wave}, {when}"
    )
    if update.options.check_finite:
        title += ", values checked (--check-finite)"
    if update.reason:
        title += f"\n  reason: {one_line(update.reason)}"
    replicas = Table(title, ("REPLICA", "WAVE", "OUTCOME", "PAUSE", "REASON"), empty="no replicas")
    for row in update.replicas:
        outcome = word(update_pb2.ReplicaOutcome, row.outcome)
        paused = pause(row.window) if row.HasField("window") else ""
        replicas.add(row.replica_id, row.wave + 1, outcome, paused, row.reason)
    yield replicas
    if has_ended:
        return
    columns = ("NODE", "STAGED", "DONE", "OF", "PERCENT", "WIRE", "FROM", "VIA", "RATE", "LEFT")
    nodes = Table(f"update {update.id}: staging", columns)
    for node in update.nodes:
        percent = f"{100 * node.bytes_done // node.bytes_total} %" if node.bytes_total else ""
        staged = "yes" if node.staged else "no"
        rate = f"{size(int(node.bytes_per_s))}/s" if node.bytes_per_s else ""
        left = f"{(node.bytes_total - node.bytes_done) / node.bytes_per_s:.0f} s" if node.bytes_per_s else ""
        done = size(node.bytes_done), size(node.bytes_total), percent
        nodes.add(node.node_id, staged, *done, size(node.wire_bytes), node.source_node_id, node.transport, rate, left)
    yield nodes


def node_table(nodes: "Iterable[fleet_pb2.Node]") -> "Table":
    from hotweights.cli.output import Table, size

    table = Table(
        "nodes", ("NODE", "CONNECTED", "IMAGES", "STAGE USED", "STAGE FREE", "SERVES AT", "QUARANTINE", "ZONE")
    )
    for node in nodes:
        table.add(
            node.id,
            "yes" if node.connected else "no",
            len(node.held_digests),
            size(node.stage_bytes_used),
            size(node.stage_bytes_free),
            node.data_endpoint,
            node.quarantine,
            node.zone,
        )
    return table


def replica_table(replicas: "Iterable[fleet_pb2.Replica]") -> "Table":
    from hotweights.cli.output import Table, pause

    columns = ("REPLICA", "MODEL", "STATE", "DESIRED", "ACTIVE", "RANKS", "LAST PAUSE", "ENGINE", "NOTE")
    table = Table("replicas", columns)
    for replica in replicas:
        table.add(
            replica.id,
            replica.model,
            _state(replica),
            replica.desired_version,
            replica.active_version or ("unversioned" if replica.connected else ""),
            len(replica.ranks),
            pause(replica.last_window) if replica.HasField("last_window") else "",
            replica.engine,
            replica.note,
        )
    return table


def route_tables(replicas: "Iterable[fleet_pb2.Replica]") -> "Iterable[Table]":
    """Only of replicas that have said how they are written; none where none has."""
    from hotweights.cli.output import Table, written

    table = Table("routes", ("REPLICA", "ROUTES"))
    for replica in replicas:
        if replica.HasField("routes"):
            table.add(replica.id, written(replica.routes))
    if table.rows:
        yield table


def _state(replica: "fleet_pb2.Replica") -> str:
    words = ["ready" if replica.ready else "not ready"] if replica.connected else ["away"]
    return ", ".join([*words, *(["excluded"] if replica.excluded else [])])


def event_table(events: "Iterable[fleet_pb2.Event]", title: str) -> "Table":
    from hotweights.cli.output import Table, moment, word
    from hotweights.v1 import fleet_pb2

    table = Table(title, ("REVISION", "AT", "KIND", "WHAT"))
    for event in events:
        table.add(event.revision, moment(event.at), word(fleet_pb2.EventKind, event.kind), event.message)
    return table
