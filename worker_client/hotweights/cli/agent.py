"""`agent`: this node's agent in the foreground, and as the agent's client starts it."""

import argparse

from hotweights.cli.arguments import Subparsers, add_access, add_command, add_endpoint, count
from hotweights.cli.errors import CommandFailed


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "agent", agent, "Run this node's agent in the foreground.")
    parser.set_defaults(has_log=True)
    add_endpoint(parser)
    add_access(parser)
    parser.add_argument("--node", help="the node's id (default: the host's name)")
    parser.add_argument("--zone", help="the rack or zone it is in: images come into each once")
    parser.add_argument("--stage-dir", metavar="DIR", help="where images are staged (default: /dev/shm/hotweights-UID)")
    parser.add_argument("--socket", metavar="PATH", help="for this node's engines (default: STAGE_DIR/agent.sock)")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="serve buckets to other nodes here (default: 127.0.0.1:0)"
    )
    parser.add_argument("--advertise", metavar="HOST:PORT", help="that address as other nodes see it")
    parser.add_argument(
        "--max-images", type=count, metavar="N", help="images kept; more only while pinned (default: 2)"
    )
    parser.add_argument(
        "--bucket-bytes",
        type=count,
        metavar="N",
        help="size of a bucket (default: a five-hundredth of the image, up to 16 MiB)",
    )
    parser.add_argument(
        "--bandwidth-max", metavar="RATE", help="send, and fetch, at most so many bytes a second: 200MB (default: all)"
    )
    parser.add_argument(
        "--lend-gpus", metavar="GPUS", help="lend images to this node's ranks in memory of these GPUs: all, or UUIDs"
    )
    parser.add_argument("--auto", action="store_true", help="end when nobody has needed it for HOTWEIGHTS_AGENT_IDLE_S")


def agent(arguments: argparse.Namespace) -> int:
    """Arguments win over the environment. `--auto` takes the settings of the client that started it as they are."""
    import dataclasses

    from hotweights.cli.config import client_settings
    from hotweights.worker_client.agent.process import run_agent

    config = client_settings(
        arguments,
        node=arguments.node,
        zone=arguments.zone,
        stage_dir=arguments.stage_dir,
        agent_socket=arguments.socket,
        listen=arguments.listen,
        advertise=arguments.advertise,
        max_images=arguments.max_images,
        bucket_bytes=arguments.bucket_bytes,
        bandwidth_max=arguments.bandwidth_max,
        lend_gpus=arguments.lend_gpus,
    )
    if arguments.auto and arguments.endpoint is None and not _endpoint_is_set():
        config = dataclasses.replace(config, endpoint=None)
    if config.endpoint is not None:
        config.access.read(config.endpoint)  # files that are no good are said now, not by the first stream
    if not arguments.auto:
        _log_to_stderr()
    try:
        run_agent(config, started_by_client=arguments.auto)
    except ValueError as error:  # an address that cannot be
        raise CommandFailed(str(error), exit_code=2) from error
    return 0


def _endpoint_is_set() -> bool:
    from hotweights.cli.config import environment

    environ = environment()
    return bool(environ.get("HOTWEIGHTS_ENDPOINT") or environ.get("HOTWEIGHTS_COORD"))


def _log_to_stderr() -> None:
    """Where a container's log is read; the agent keeps its own log in the stage besides."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("hotweights").addHandler(handler)
