"""Every setting of the coordinator, read once: the command line over the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.failpoints import BadFailpoint, parse_failpoints


class BadSetting(ValueError):
    """A setting that cannot be used; the message says what it takes."""


@dataclass(frozen=True)
class Config:
    """Seconds unless named otherwise. `keep_versions` 0 keeps all."""

    endpoint: Endpoint
    store: str
    insecure: bool = False
    keep_versions: int = 0
    keep_events: int = 100_000
    heartbeat_s: float = 5.0
    lease_s: float = 15.0
    stop_grace_s: float = 5.0
    failpoints: str = ""

    def check(self) -> None:
        """Raises BadSetting for what would not be safe or would not work."""
        if not self.endpoint.is_loopback and not self.insecure:
            raise BadSetting(
                f"{self.endpoint} can be reached from other machines and nothing on it is "
                "encrypted; bind a loopback address, or pass --insecure on a network you trust"
            )
        if self.keep_versions < 0 or self.keep_events < 1:
            raise BadSetting("--keep-versions is 0 or more, --keep-events 1 or more")
        if not 0 < self.heartbeat_s * 2 <= self.lease_s <= 3600:
            raise BadSetting("--lease is at least two heartbeats and at most 3600 seconds")
        try:
            parse_failpoints(self.failpoints)
        except BadFailpoint as error:
            raise BadSetting(f"HOTWEIGHTS_FAILPOINTS: {error}") from error


def default_store(environ: Mapping[str, str] | None = None) -> str:
    """HOTWEIGHTS_STORE, or a file where the platform keeps state."""
    env = os.environ if environ is None else environ
    state = Path(platformdirs.user_state_dir("hotweights", appauthor=False))
    return env.get("HOTWEIGHTS_STORE") or f"sqlite:{state / 'coordinator.db'}"


def default_endpoint(environ: Mapping[str, str] | None = None) -> str:
    """HOTWEIGHTS_ENDPOINT or HOTWEIGHTS_COORD, or loopback."""
    env = os.environ if environ is None else environ
    return env.get("HOTWEIGHTS_ENDPOINT") or env.get("HOTWEIGHTS_COORD") or "tcp://127.0.0.1:5555"


def default_failpoints(environ: Mapping[str, str] | None = None) -> str:
    """HOTWEIGHTS_FAILPOINTS, as the worker side reads it."""
    env = os.environ if environ is None else environ
    return env.get("HOTWEIGHTS_FAILPOINTS", "")


def load_config(endpoint: str | None = None, store: str | None = None, **settings: float | bool) -> Config:
    """Settings given as arguments win over the environment. Raises BadSetting or BadEndpoint."""
    config = Config(
        endpoint=parse_endpoint(endpoint or default_endpoint()),
        store=store or default_store(),
        failpoints=default_failpoints(),
        **settings,  # type: ignore[arg-type]
    )
    config.check()
    return config
