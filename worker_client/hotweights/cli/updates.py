"""`update`, `rollback`, `cancel`, `resume` and `plan`: starting updates, and looking before."""

import argparse
from typing import TYPE_CHECKING

from hotweights.cli.arguments import (
    Subparsers,
    add_command,
    add_connection,
    add_model,
    add_update_options,
    add_waiting,
    update_options,
)

if TYPE_CHECKING:
    from hotweights.cli.client import Coordinator
    from hotweights.v1 import update_pb2


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "update", update, "Take a model's replicas to a version, and wait for the end.")
    parser.add_argument("version", nargs="?", default="", metavar="VERSION", help="default: the newest")
    _add_common(parser)
    add_waiting(parser)

    parser = add_command(commands, "rollback", rollback, "Take a model's replicas back, and hold its policy.")
    parser.add_argument(
        "version", nargs="?", default="", metavar="VERSION", help="default: the one committed before the present one"
    )
    _add_common(parser, forward=False)
    add_waiting(parser)

    parser = add_command(commands, "plan", plan, "Show how an update would go; changes nothing.")
    parser.add_argument("version", nargs="?", default="", metavar="VERSION", help="default: the newest")
    _add_common(parser)

    parser = add_command(commands, "cancel", cancel, "Cancel an update that is not decided yet.")
    parser.add_argument("id", metavar="UPDATE_ID", help="as coord-status shows it")
    add_connection(parser)

    parser = add_command(commands, "resume", resume, "Lift the hold that a rollback put on a model.")
    add_model(parser)
    add_connection(parser)


def _add_common(parser: argparse.ArgumentParser, *, forward: bool = True) -> None:
    add_model(parser)
    add_connection(parser)
    add_update_options(parser, forward=forward)


async def update(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import chosen_model, connect
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        request = pb.StartUpdateRequest(
            model=await chosen_model(coordinator, arguments),
            version=arguments.version,
            options=update_options(arguments),
        )
        started = await coordinator.ask(request, pb.StartUpdateResponse)
        return await _see_through(coordinator, started.update, arguments)


async def rollback(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import chosen_model, connect
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        request = pb.RollBackRequest(
            model=await chosen_model(coordinator, arguments),
            version=arguments.version,
            options=update_options(arguments),
        )
        started = await coordinator.ask(request, pb.RollBackResponse)
        return await _see_through(coordinator, started.update, arguments)


async def _see_through(coordinator: "Coordinator", started: "update_pb2.Update", arguments: argparse.Namespace) -> int:
    from hotweights.cli.follow import show_end, wait_for_end
    from hotweights.cli.output import print_json

    if arguments.wait:
        ended = await wait_for_end(coordinator, started, arguments.wait_timeout, quiet=arguments.json)
        if arguments.json:
            print_json(ended)
        return show_end(ended, quiet=arguments.json)
    if arguments.json:
        print_json(started)
    else:
        print(f"{started.id}: to {started.target_version}; `hotweights coord-status` shows how it goes")
    return 0


async def cancel(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import connect
    from hotweights.cli.output import print_json, word
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import update_pb2

    async with connect(arguments) as coordinator:
        response = await coordinator.ask(pb.CancelUpdateRequest(id=arguments.id), pb.CancelUpdateResponse)
    if arguments.json:
        print_json(response.update)
    else:
        print(f"{response.update.id}: {word(update_pb2.UpdatePhase, response.update.phase)}")
    return 0


async def resume(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import chosen_model, connect
    from hotweights.cli.output import print_json, word
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import model_pb2

    async with connect(arguments) as coordinator:
        request = pb.ResumeModelRequest(model=await chosen_model(coordinator, arguments))
        model = (await coordinator.ask(request, pb.ResumeModelResponse)).model
    if arguments.json:
        print_json(model)
    else:
        print(f"{model.name}: no longer held, policy {word(model_pb2.ModelPolicy, model.policy)}")
    return 0


async def plan(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import chosen_model, connect
    from hotweights.cli.output import print_json
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        request = pb.PlanUpdateRequest(
            model=await chosen_model(coordinator, arguments),
            version=arguments.version,
            options=update_options(arguments),
        )
        answer = (await coordinator.ask(request, pb.PlanUpdateResponse)).plan
    if arguments.json:
        print_json(answer)
    else:
        _show_plan(answer)
    return 0


def _show_plan(answer: "update_pb2.Plan") -> None:
    from hotweights.cli.output import Table, counted, one_line, print_tables, size

    nodes = Table("what each node fetches", ("NODE", "BYTES", "BUCKETS", "UNCHANGED", "SOURCES"))
    for node in answer.nodes:
        sources = ", ".join(node.source_node_ids) or ("has it" if not node.fetch_bytes else "nobody")
        nodes.add(node.node_id, size(node.fetch_bytes), node.fetch_buckets, size(node.unchanged_bytes), sources)
    waves = Table("waves", ("WAVE", "REPLICAS", "NAMES"))
    for number, wave in enumerate(answer.waves, start=1):
        waves.add(number, len(wave.replica_ids), ", ".join(wave.replica_ids))
    fetched = sum(node.fetch_bytes for node in answer.nodes)
    unchanged = sum(node.unchanged_bytes for node in answer.nodes)
    buckets = sum(node.fetch_buckets for node in answer.nodes)
    print(
        f"{answer.model}: from {answer.base_version or 'unversioned'} to {answer.target_version}: "
        f"{size(fetched)} in {counted(buckets, 'bucket')} to {counted(len(answer.nodes), 'node')}"
        + (f", of which {size(unchanged)} are there unchanged" if unchanged else "")
    )
    print_tables(nodes, waves)
    for note in answer.notes:
        print(f"note: {one_line(note)}")
