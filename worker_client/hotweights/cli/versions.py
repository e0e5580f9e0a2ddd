"""`versions` and `versions delete`."""

import argparse

from hotweights.cli.arguments import Subparsers, add_command, add_connection, add_model


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "versions", versions, "List the versions, newest first; or delete one.")
    add_model(parser, "default: HOTWEIGHTS_MODEL, else all")
    add_connection(parser)
    actions = parser.add_subparsers(metavar="delete")
    nested = add_command(actions, "delete", delete, "Delete a version that nothing serves or may go back to.")
    nested.add_argument("model", metavar="MODEL")
    nested.add_argument("version", metavar="VERSION")
    add_connection(nested, nested=True)


async def versions(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import PAGES_MAX, connect
    from hotweights.cli.output import as_plain, print_json, print_tables
    from hotweights.cli.status import version_table
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import model_pb2

    found: list[model_pb2.Version] = []
    async with connect(arguments) as coordinator:
        model = arguments.model or coordinator.settings.model
        if model:
            await coordinator.status(model)  # refuses a model that there is not, and lists those that there are
        token = ""
        for _ in range(PAGES_MAX):
            request = pb.ListVersionsRequest(model=model, page_token=token)
            page = await coordinator.ask(request, pb.ListVersionsResponse)
            found.extend(page.versions)
            token = page.next_page_token
            if not token:
                break
    if arguments.json:
        print_json([as_plain(version) for version in found])
    else:
        print_tables(version_table(found, title=""))
    return 0


async def delete(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import connect
    from hotweights.cli.output import print_json
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        request = pb.DeleteVersionRequest(model=arguments.model, version=arguments.version)
        await coordinator.ask(request, pb.DeleteVersionResponse)
    if arguments.json:
        print_json({"model": arguments.model, "version": arguments.version, "deleted": True})
    else:
        print(f"{arguments.model} {arguments.version}: deleted")
    return 0
