"""`coord-serve` and `coord-health`: the coordinator as a process, and whether it is well."""

import argparse
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from hotweights.cli.arguments import Subparsers, add_access, add_command, add_endpoint, add_json, count, seconds
from hotweights.cli.errors import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

    from hotweights.coordinator.config import Config

# What the [coordinator] extra brings.
_EXTRA = {"platformdirs", "grpc_health", "grpc_reflection"}


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "coord-serve", coord_serve, "Run a coordinator in the foreground.", "serve")
    parser.set_defaults(has_log=True)
    add_endpoint(parser)
    parser.add_argument("--store", help="sqlite:PATH or memory: (default: HOTWEIGHTS_STORE, else the user's state)")
    parser.add_argument(
        "--tokens", metavar="FILE", help="who may do what, a token a line (default: HOTWEIGHTS_TOKENS, else all may)"
    )
    parser.add_argument("--keep-versions", type=_keep, default=0, metavar="N", help="of a model; 0 keeps all (default)")
    parser.add_argument(
        "--keep-events", type=count, default=100_000, metavar="N", help="for watchers (default: 100000)"
    )
    parser.add_argument("--heartbeat", type=seconds, default=5.0, metavar="S", help="seconds (default: 5)")
    parser.add_argument(
        "--lease", type=seconds, default=15.0, metavar="S", help="not heard from this long counts as gone (default: 15)"
    )
    group = parser.add_argument_group("TLS", "Files in PEM form; they are read again when they change.")
    group.add_argument("--tls-cert", type=_path, metavar="FILE", help="its certificate (default: HOTWEIGHTS_TLS_CERT)")
    group.add_argument("--tls-key", type=_path, metavar="FILE", help="the key (default: HOTWEIGHTS_TLS_KEY)")
    group.add_argument(
        "--client-ca",
        type=_path,
        metavar="FILE",
        help="clients must show a certificate that this authority signed (default: HOTWEIGHTS_CLIENT_CA)",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow an endpoint that other machines reach, in plaintext"
    )

    parser = add_command(commands, "coord-health", coord_health, "Exit with 0 if the coordinator serves, else with 1.")
    add_endpoint(parser)
    parser.add_argument("--timeout", type=seconds, default=3.0, metavar="S", help="seconds (default: 3)")
    add_json(parser)
    add_access(parser)


def _path(text: str) -> "Path":
    from pathlib import Path

    return Path(text).expanduser()


def _keep(text: str) -> int:
    return 0 if text == "0" else count(text)


def coord_serve(arguments: argparse.Namespace) -> int:
    config = _coordinator_config(arguments)
    from hotweights.coordinator.server import CannotBind, serve
    from hotweights.coordinator.store.base import StoreError
    from hotweights.wire.certificates import BadCertificate
    from hotweights.wire.endpoint import Endpoint

    def say_where(endpoint: Endpoint) -> None:
        print(f"coordinator at {endpoint}, store {config.store}", flush=True)

    log_to_stderr()
    try:
        _event_loop()(serve(config, say_where))
    except BadCertificate as error:
        raise CommandFailed(str(error), exit_code=2) from error
    except (CannotBind, StoreError) as error:
        raise CommandFailed(str(error)) from error
    return 0


def _coordinator_config(arguments: argparse.Namespace) -> "Config":
    """The coordinator's settings, its store's name checked. Raises CommandFailed."""
    from pathlib import Path

    from hotweights.wire.endpoint import parse_endpoint

    if arguments.endpoint is not None:
        parse_endpoint(arguments.endpoint)  # an empty one is an error, not the default
    try:
        from hotweights.coordinator.access.tokens import read_tokens
        from hotweights.coordinator.config import load_config
        from hotweights.coordinator.server import serve  # noqa: F401 - is all there that it needs?
        from hotweights.coordinator.store import open_store
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        message = f"the coordinator needs {error.name}, which is not installed: pip install 'hotweights[coordinator]'"
        raise CommandFailed(message) from error
    try:
        config = load_config(
            arguments.endpoint,
            arguments.store,
            arguments.tokens,
            insecure=arguments.insecure,
            keep_versions=arguments.keep_versions,
            keep_events=arguments.keep_events,
            heartbeat_s=arguments.heartbeat,
            lease_s=arguments.lease,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            client_ca=arguments.client_ca,
        )
        open_store(config.store, config.keep_events)  # reads the name; touches nothing yet
        if config.tokens:
            read_tokens(Path(config.tokens))
    except ValueError as error:  # BadSetting, BadEndpoint, BadTokens, and the store's name
        raise CommandFailed(str(error), exit_code=2) from error
    return config


def _event_loop() -> Callable[[Coroutine[Any, Any, None]], None]:
    """uvloop where the platform has it; the log says which."""
    import asyncio
    import logging

    log = logging.getLogger(__name__)
    try:
        import uvloop
    except ModuleNotFoundError:
        log.info("event loop: asyncio, as uvloop is not installed")
        return asyncio.run
    log.info("event loop: uvloop")
    return uvloop.run


def log_to_stderr() -> None:
    """For the commands that stay: stdout is for what they were asked."""
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


async def coord_health(arguments: argparse.Namespace) -> int:
    """The standard health protocol, spelled out: its messages are two bytes, its package an extra."""
    import grpc

    from hotweights.cli.config import client_settings
    from hotweights.cli.output import print_json
    from hotweights.wire.channel import open_channel
    from hotweights.wire.problems import call_error

    names = {b"": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}  # HealthCheckResponse.status
    settings = client_settings(arguments)
    endpoint = settings.endpoint
    assert endpoint is not None
    problem = ""
    async with open_channel(endpoint, settings.access) as channel:
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            status = names.get(await check(b"", timeout=arguments.timeout), "UNKNOWN")
        except grpc.aio.AioRpcError as error:
            why = str(call_error(error, endpoint, settings.access)).removeprefix(f"coordinator {endpoint}: ")
            status, problem = "UNREACHABLE", f" ({why})"
    if arguments.json:
        print_json({"endpoint": str(endpoint), "status": status})
    elif status == "SERVING":
        print(f"coordinator {endpoint}: serving")
    else:
        raise CommandFailed(f"coordinator {endpoint}: {status.replace('_', ' ').lower()}{problem}")
    return 0 if status == "SERVING" else 1
