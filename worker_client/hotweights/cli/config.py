"""The settings as the command line has them: its own arguments over the environment."""

import argparse
import dataclasses
import os
from collections.abc import Mapping

from hotweights.cli.errors import CommandFailed
from hotweights.wire.endpoint import parse_endpoint
from hotweights.worker_client.config import Config, load_config

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def environment() -> Mapping[str, str]:
    """What settings are read from."""
    return os.environ


def quieten_grpc() -> None:
    """gRPC tells stderr of handshakes that fail; a command says why in one line of its own. Before gRPC is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def read_settings(endpoint: str | None = None, **given: object) -> Config:
    """The worker side's settings; `given` are by the variable's name without HOTWEIGHTS_, None is not given.

    The endpoint is always set. Raises BadSetting, BadEndpoint.
    """
    variables = {f"HOTWEIGHTS_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    config = load_config({**os.environ, **variables})
    if endpoint is not None:
        return dataclasses.replace(config, endpoint=parse_endpoint(endpoint))
    return config if config.endpoint else dataclasses.replace(config, endpoint=parse_endpoint(DEFAULT_ENDPOINT))


def client_settings(arguments: argparse.Namespace, **given: object) -> Config:
    """As read_settings, of a command with add_endpoint and add_access. Raises CommandFailed too."""
    files = {name: getattr(arguments, name) for name in ("ca", "cert", "key", "token_file")}
    config = read_settings(arguments.endpoint, **files, **given)
    assert config.endpoint is not None, "read_settings sets it"
    for option in ("ca", "cert"):
        if files[option] is not None and not config.endpoint.tls:
            raise CommandFailed(f"--{option} goes with grpcs://HOST:PORT; {config.endpoint} is no TLS", exit_code=2)
    return config
