"""`events`: the log, and what is added to it."""

import argparse
from typing import TYPE_CHECKING

from hotweights.cli.arguments import Subparsers, add_command, add_connection, add_model, count
from hotweights.cli.errors import CommandFailed

if TYPE_CHECKING:
    from hotweights.cli.client import Coordinator
    from hotweights.v1 import fleet_pb2


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "events", events, "Show the event log; with --json one event a line.")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as the log grows")
    parser.add_argument("--from", dest="from_revision", type=count, metavar="REV", help="from this revision on")
    parser.add_argument("--last", type=count, default=20, metavar="N", help="without --from: how many (default: 20)")
    add_model(parser, "default: all")
    add_connection(parser)


async def events(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import connect

    async with connect(arguments) as coordinator:
        status = await coordinator.status(arguments.model or "", min(arguments.last, 100))
        if arguments.from_revision is None:
            for event in status.events:
                _show(event, arguments)
            next_revision = status.revision + 1
        else:
            next_revision = arguments.from_revision
            if next_revision <= status.revision:
                next_revision = await _show_until(coordinator, next_revision, status.revision, arguments)
        if arguments.follow:
            await _follow(coordinator, next_revision, status.cluster_id, arguments)
    return 0


async def _show_until(coordinator: "Coordinator", first: int, last: int, arguments: argparse.Namespace) -> int:
    """Shows the events of these revisions. Returns the revision after the last."""
    import contextlib

    async with contextlib.aclosing(coordinator.events(first)) as stream:
        async for event in stream:
            if event.revision <= last:
                _show(event, arguments)
            if event.revision >= last:
                break
    return last + 1


async def _follow(coordinator: "Coordinator", first: int, cluster_id: str, arguments: argparse.Namespace) -> None:
    """Shows events for ever, over a coordinator that restarts on the same store. Raises Unreachable, CommandFailed."""
    from hotweights.cli.follow import patient
    from hotweights.wire.errors import Unreachable

    while True:
        try:
            async for event in coordinator.events(first):
                _show(event, arguments)
                first = event.revision + 1
        except Unreachable:
            # The deadline of one watch, or the coordinator is away.
            status = await patient(coordinator.status)
            if status.cluster_id != cluster_id:
                raise CommandFailed(f"coordinator {coordinator.endpoint} came back with another store") from None


def _show(event: "fleet_pb2.Event", arguments: argparse.Namespace) -> None:
    from hotweights.cli.output import moment, one_line, print_json_line, word
    from hotweights.v1 import fleet_pb2

    if arguments.model and event.model != arguments.model:
        return
    if arguments.json:
        print_json_line(event)
        return
    kind = word(fleet_pb2.EventKind, event.kind)
    print(f"{event.revision:>6}  {moment(event.at)}  {kind:<19}  {one_line(event.message)}", flush=True)
