"""`hotweights COMMAND`: the parser, and the way from its answer to an exit code.

Nothing here imports gRPC, numpy or rich: `hotweights --help` answers at once.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from hotweights.cli import (
    agent,
    events,
    failpoints,
    fleet,
    publish,
    serve,
    settings,
    status,
    token,
    updates,
    verify,
    versions,
)

GROUPS = (serve, agent, publish, verify, updates, status, versions, events, fleet, token, settings, failpoints)

_EPILOG = """\
The coordinator is --endpoint, else HOTWEIGHTS_ENDPOINT, else HOTWEIGHTS_COORD, else tcp://127.0.0.1:5555.
Exit codes: 0 done; 1 refused, failed or not reached; 2 wrong usage or setting; 130 interrupted."""


class _ShowVersion(argparse.Action):
    """Looks the version up only when asked: the metadata of a large environment takes its time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"hotweights {importlib.metadata.version('hotweights')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotweights",
        description="Put new model weights into running vLLM engines: all or nothing, proven, and one call back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code; argparse itself exits with 2 for wrong usage."""
    arguments = build_parser().parse_args(argv)
    from hotweights.cli.config import quieten_grpc

    if not getattr(arguments, "has_log", False):
        quieten_grpc()
    from hotweights.cli.running import run_command

    return run_command(arguments)
