"""`publish`: a folder or a model of the local cache becomes a version, handed to this node's agent."""

import argparse
from typing import TYPE_CHECKING

from hotweights.cli.arguments import (
    Subparsers,
    add_command,
    add_connection,
    add_model,
    add_update_options,
    add_wait_timeout,
    count,
    update_options,
)
from hotweights.cli.errors import CommandFailed

if TYPE_CHECKING:
    from hotweights.cli.client import Coordinator
    from hotweights.v1 import model_pb2, update_pb2


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    text = "Publish a checkpoint folder as a version; this node's agent serves it from then on."
    parser = add_command(commands, "publish", publish, text)
    parser.add_argument("source", metavar="DIR|MODEL_ID", help="a folder, or an id in the local Hugging Face cache")
    parser.add_argument("--version", required=True, metavar="NAME", help="the version's name")
    add_model(parser)
    parser.add_argument("--include-code", action="store_true", help="take *.py files along")
    parser.add_argument("--wait-copies", type=count, metavar="N", help="wait until N nodes hold it")
    parser.add_argument("--update", action="store_true", help="start an update to it as soon as there are replicas")
    parser.add_argument(
        "--wait", action="store_true", help="with --update: wait for its end, as `hotweights update` does"
    )
    add_wait_timeout(parser)
    add_connection(parser)
    add_update_options(parser)


async def publish(arguments: argparse.Namespace) -> int:
    from hotweights.worker_client.image import ImageError

    if arguments.wait and not arguments.update:
        raise CommandFailed("--wait waits for the update that --update starts; --wait-copies for copies", exit_code=2)
    try:
        return await _publish(arguments)
    except ImageError as error:
        raise CommandFailed(str(error)) from error


async def _publish(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import chosen_model, connect
    from hotweights.cli.output import print_json
    from hotweights.worker_client.image import resolve_model

    async with connect(arguments) as coordinator:
        model = await chosen_model(coordinator, arguments)
        folder = resolve_model(arguments.source, coordinator.settings.hf_cache)
        before = await _updates(coordinator, model)  # also: is it there? Hashing may take minutes
        version = await _hand_over(coordinator, str(folder), model, arguments)
        if not arguments.json:
            _show_published(version)
        if arguments.wait_copies:
            version = await _wait_for_copies(coordinator, version, arguments)
        if arguments.wait:
            return await _wait_for_update(coordinator, version, before, arguments)
    if arguments.json:
        print_json(version)
    elif arguments.update:
        print("an update to it starts as soon as replicas are attached; `hotweights coord-status` shows it")
    return 0


async def _hand_over(
    coordinator: "Coordinator", folder: str, model: str, arguments: argparse.Namespace
) -> "model_pb2.Version":
    """Returns when the version is durable."""
    from pathlib import Path

    from hotweights.cli.progress import Bar
    from hotweights.worker_client.agent_client import connect_or_start

    agent = await connect_or_start(coordinator.settings)
    try:
        with Bar(f"hashing {arguments.version}", wanted=not arguments.json) as bar:
            return await agent.publish_folder(
                Path(folder),
                model,
                arguments.version,
                start_update=arguments.update,
                options=update_options(arguments),
                include_code=arguments.include_code,
                progress=bar.to,
            )
    finally:
        await agent.close()


def _show_published(version: "model_pb2.Version") -> None:
    from hotweights.cli.output import counted, size

    print(
        f"{version.model} {version.name}: published, {size(version.image_bytes)}, "
        f"{counted(version.tensor_count, 'tensor')} in {counted(version.bucket_count, 'bucket')}, "
        f"digest {version.manifest_digest.hex()}",
        flush=True,
    )


async def _wait_for_copies(
    coordinator: "Coordinator", version: "model_pb2.Version", arguments: argparse.Namespace
) -> "model_pb2.Version":
    """The version once enough nodes hold it. Raises CommandFailed when the time is over."""
    from hotweights.cli.follow import until
    from hotweights.v1 import coordinator_service_pb2 as pb

    request = pb.GetVersionRequest(model=version.model, version=version.name)
    present = version

    async def enough() -> "model_pb2.Version | None":
        nonlocal present
        present = (await coordinator.ask(request, pb.GetVersionResponse)).version
        return present if len(present.holder_node_ids) >= arguments.wait_copies else None

    found = await until(enough, arguments.wait_timeout)
    holders = ", ".join(present.holder_node_ids) or "nobody"
    if found is None:
        raise CommandFailed(
            f"{version.model} {version.name} is published, but after {arguments.wait_timeout:g} s it is held by "
            f"{len(present.holder_node_ids)} of {arguments.wait_copies} nodes: {holders}"
        )
    if not arguments.json:
        print(f"{version.model} {version.name}: held by {holders}", flush=True)
    return found


async def _wait_for_update(
    coordinator: "Coordinator",
    version: "model_pb2.Version",
    before: "list[update_pb2.Update]",
    arguments: argparse.Namespace,
) -> int:
    """The update that the publication starts, to its end. The JSON has both the version and the update."""
    from hotweights.cli.follow import show_end, until, wait_for_end
    from hotweights.cli.output import as_plain, print_json

    known = {update.id for update in before}

    async def begun() -> "update_pb2.Update | None":
        for update in await _updates(coordinator, version.model):
            is_open = not update.HasField("ended_at")
            if update.target_version == version.name and (is_open or update.id not in known):
                return update
        return None

    status = await coordinator.status(version.model)
    if any(model.committed_version == version.name for model in status.models) and await begun() is None:
        if arguments.json:
            print_json({"version": as_plain(version), "update": None})
        else:
            print(f"{version.model} is committed to {version.name} already")
        return 0
    update = await until(begun, arguments.wait_timeout)
    if update is None:
        raise CommandFailed(
            f"{version.model} {version.name} is published, but no update to it began within "
            f"{arguments.wait_timeout:g} s; `hotweights plan {version.name}` says why"
        )
    ended = await wait_for_end(coordinator, update, arguments.wait_timeout, quiet=arguments.json)
    if arguments.json:
        print_json({"version": as_plain(version), "update": as_plain(ended)})
    return show_end(ended, quiet=arguments.json)


async def _updates(coordinator: "Coordinator", model: str) -> "list[update_pb2.Update]":
    """The model's newest updates, catch-ups left out."""
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import update_pb2

    request = pb.ListUpdatesRequest(model=model, page_size=100)
    found = (await coordinator.ask(request, pb.ListUpdatesResponse)).updates
    return [update for update in found if update.kind != update_pb2.UPDATE_KIND_CATCH_UP]
