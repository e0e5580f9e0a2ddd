"""Settings given by code over those of the environment."""

import dataclasses
from collections.abc import Mapping

from hotweights.wire.endpoint import parse_endpoint
from hotweights.worker_client.config import Config, load_config


def settings(
    endpoint: str | None = None, model: str | None = None, name_map: Mapping[str, str] | None = None
) -> Config:
    """The environment's settings with what is not None in their place. Raises BadSetting, BadEndpoint."""
    config = load_config()
    if endpoint is not None:
        config = dataclasses.replace(config, endpoint=parse_endpoint(endpoint))
    if model is not None:
        config = dataclasses.replace(config, model=model)
    if name_map is not None:
        config = dataclasses.replace(config, name_map=dict(name_map))
    return config
