"""`token`: a fresh line for the coordinator's tokens file, and the file its holder shows it from."""

import argparse

from hotweights.cli.arguments import Subparsers, add_command
from hotweights.cli.errors import CommandFailed

_ROLES = ("viewer", "worker", "publisher", "operator")


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "token", token, "Draw a token; print its line for the coordinator's tokens file.")
    parser.add_argument("role", choices=_ROLES, metavar="ROLE", help="viewer, worker, publisher or operator")
    parser.add_argument("name", metavar="NAME", help="whose it is, as the event log will name him")
    parser.add_argument(
        "--out", metavar="FILE", help="write the token here, for its holder; the line then has only its hash"
    )


def token(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from hotweights.coordinator.access.tokens import BadTokens, hashed, new_token, parse_tokens

    drawn = new_token()
    line = f"{arguments.role} {arguments.name} {hashed(drawn) if arguments.out else drawn}"
    try:
        parse_tokens(Path("of one line"), line.encode())
    except (BadTokens, UnicodeEncodeError) as error:
        raise CommandFailed(f"{arguments.name!r} is no name: {error}", exit_code=2) from error
    if arguments.out:
        _write(arguments.out, drawn)
    print(line)
    return 0


def _write(path: str, drawn: str) -> None:
    """Raises OSError; a file that is there stays: somebody may be using its token."""
    import os

    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600)
    except FileExistsError as error:
        raise CommandFailed(f"{path} is there already; name another file, or remove it") from error
    with os.fdopen(handle, "w") as file:
        file.write(f"{drawn}\n")
