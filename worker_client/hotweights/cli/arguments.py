"""Arguments that several commands share, and what they stand for."""

import argparse
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotweights.v1 import update_pb2

CALL_DEADLINE_S = 10.0
WAIT_DEADLINE_S = 3600.0

Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns
Command = Callable[[argparse.Namespace], "int | Coroutine[Any, Any, int]"]


def add_command(
    commands: "Subparsers[argparse.ArgumentParser]", name: str, run: Command, text: str, *aliases: str
) -> argparse.ArgumentParser:
    """A command whose help is `text`; `run` gets the parsed arguments."""
    help_text = text[0].lower() + text[1:].rstrip(".")
    parser = commands.add_parser(name, aliases=aliases, help=help_text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_endpoint(parser: argparse.ArgumentParser, default: Any = None) -> None:
    parser.add_argument(
        "--endpoint",
        default=default,
        help="the coordinator: grpcs://HOST:PORT, tcp://HOST:PORT, grpc://HOST:PORT, HOST:PORT or unix:PATH",
    )


def add_access(parser: argparse.ArgumentParser, *, nested: bool = False) -> None:
    """What is shown to the coordinator. Files only: an argument is seen by everybody on the machine."""
    group = parser.add_argument_group("to the coordinator")
    for option, what in (
        ("--ca", "whose certificates are trusted"),
        ("--cert", "the certificate shown to a coordinator that wants one"),
        ("--key", "its key"),
        ("--token-file", "holds the token that is shown"),
    ):
        variable = f"HOTWEIGHTS_{option[2:].replace('-', '_').upper()}"
        group.add_argument(
            option,
            metavar="FILE",
            default=argparse.SUPPRESS if nested else None,
            help=f"{what} (default: {variable})",
        )


def add_connection(parser: argparse.ArgumentParser, *, nested: bool = False) -> None:
    """What every command that asks the coordinator takes.

    A nested command leaves unset what it was not given, so that the outer command's value stays.
    """
    add_endpoint(parser, argparse.SUPPRESS if nested else None)
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=argparse.SUPPRESS if nested else CALL_DEADLINE_S,
        metavar="S",
        help="deadline of one call to the coordinator (default: 10)",
    )
    add_json(parser, nested=nested)
    add_access(parser, nested=nested)


def add_json(parser: argparse.ArgumentParser, *, nested: bool = False) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS if nested else False,
        help="print JSON on stdout, and nothing else there",
    )


def add_model(parser: argparse.ArgumentParser, text: str = "default: HOTWEIGHTS_MODEL, else the only one") -> None:
    parser.add_argument("--model", help=f"the model ({text})")


def add_waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wait for the update's end; the exit code is 0 only when it was committed (default: wait)",
    )
    parser.add_argument("--follow", dest="wait", action="store_true", help="the same as --wait")
    add_wait_timeout(parser)


def add_wait_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait-timeout",
        type=seconds,
        default=WAIT_DEADLINE_S,
        metavar="S",
        help="stop waiting after this; the update goes on (default: 3600)",
    )


def add_update_options(parser: argparse.ArgumentParser, *, forward: bool = True) -> None:
    """The fields of UpdateOptions; what is not given takes the coordinator's default.

    `forward` is not going back: that is to a version that served, and is not made to wait for a look at it.
    """
    group = parser.add_argument_group("how the update goes")
    group.add_argument(
        "--failure-policy", choices=("rollback", "evict"), help="what a failed replica means (default: rollback)"
    )
    group.add_argument(
        "--inflight",
        choices=("recompute", "drain", "abort", "keep"),
        help="what becomes of requests in flight (default: recompute); keep: they go on over what is computed",
    )
    group.add_argument("--canary", type=count, metavar="N", help="replicas of the first wave (default: 1)")
    group.add_argument("--max-unavailable", metavar="N|N%", help="replicas of a later wave (default: 100%%)")
    group.add_argument("--max-failed", metavar="N|N%", help="failures that evict tolerates (default: 10%%)")
    for phase, default in (("staging", 1800), ("quiesce", 30), ("apply", 120), ("asleep", 3600)):
        group.add_argument(f"--{phase}-deadline", type=seconds, metavar="S", help=f"seconds (default: {default})")
    parser.set_defaults(check_finite=False)
    if forward:
        group.add_argument(
            "--check-finite", action="store_true", help="refuse a version with NaN or infinite values before any pause"
        )


def update_options(arguments: argparse.Namespace) -> "update_pb2.UpdateOptions":
    from hotweights.v1 import update_pb2

    return update_pb2.UpdateOptions(
        failure_policy=_value("FAILURE_POLICY", arguments.failure_policy),
        inflight=_value("INFLIGHT", arguments.inflight),
        canary=arguments.canary or 0,
        max_unavailable=arguments.max_unavailable or "",
        max_failed=arguments.max_failed or "",
        staging_deadline_s=arguments.staging_deadline or 0.0,
        quiesce_deadline_s=arguments.quiesce_deadline or 0.0,
        apply_deadline_s=arguments.apply_deadline or 0.0,
        asleep_deadline_s=arguments.asleep_deadline or 0.0,
        check_finite=arguments.check_finite,
    )


def _value(kind: str, word: str | None) -> str | None:
    """An enum's value as the protocol names it."""
    return f"{kind}_{word.upper()}" if word else None


def seconds(text: str) -> float:
    """A positive time. Raises ArgumentTypeError, as argparse wants it."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def count(text: str) -> int:
    """A whole number from 1. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
