"""`failpoints`: the places where a test can inject a failure."""

import argparse

from hotweights.cli.arguments import Subparsers, add_command, add_json


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "failpoints", failpoints, "List the places where tests can inject failures.")
    add_json(parser)


def failpoints(arguments: argparse.Namespace) -> int:
    import dataclasses

    from hotweights.cli.output import Table, print_json, print_tables
    from hotweights.wire.failpoints import POINTS

    if arguments.json:
        print_json([dataclasses.asdict(point) for point in POINTS])
        return 0
    title = "HOTWEIGHTS_FAILPOINTS=NAME[=N]:raise|hang=SECONDS|kill|stop,... or @FILE"
    table = Table(title, ("NAME", "PROCESS", "WHERE", "N COUNTS"), empty="none")
    for point in POINTS:
        table.add(point.name, point.process, point.where, point.number or "passes")
    print_tables(table)
    return 0
