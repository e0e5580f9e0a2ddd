"""The settings as the command line has them: its own arguments over the environment."""

import dataclasses
import os
from collections.abc import Mapping

from hotweights.wire.endpoint import parse_endpoint
from hotweights.worker_client.config import Config, load_config

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def environment() -> Mapping[str, str]:
    """What settings are read from."""
    return os.environ


def read_settings(endpoint: str | None = None, **given: object) -> Config:
    """The worker side's settings; `given` are by the variable's name without HOTWEIGHTS_, None is not given.

    The endpoint is always set. Raises BadSetting, BadEndpoint.
    """
    variables = {f"HOTWEIGHTS_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    config = load_config({**os.environ, **variables})
    if endpoint is not None:
        return dataclasses.replace(config, endpoint=parse_endpoint(endpoint))
    return config if config.endpoint else dataclasses.replace(config, endpoint=parse_endpoint(DEFAULT_ENDPOINT))
