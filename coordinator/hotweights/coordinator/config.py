"""Every setting of the coordinator, read once: the command line over the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.failpoints import BadFailpoint, parse_failpoints


class BadSetting(ValueError):
    """A setting that cannot be used; the message says what it takes."""


@dataclass(frozen=True)
class Config:
    """Seconds unless named otherwise. `keep_versions` 0 keeps all; `tokens` is a file, empty lets everyone in."""

    endpoint: Endpoint
    store: str
    insecure: bool = False
    tokens: str = ""
    keep_versions: int = 0
    keep_events: int = 100_000
    heartbeat_s: float = 5.0
    lease_s: float = 15.0
    stop_grace_s: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    failpoints: str = ""

    def check(self) -> None:
        """Raises BadSetting for what would not be safe or would not work."""
        self._check_tls()
        if not self.endpoint.is_loopback and not self.tls_cert and not self.insecure:
            raise BadSetting(
                f"{self.endpoint} can be reached from other machines and nothing on it is encrypted; give --tls-cert "
                "and --tls-key, bind a loopback address, or pass --insecure on a network you trust"
            )
        if self.keep_versions < 0 or self.keep_events < 1:
            raise BadSetting("--keep-versions is 0 or more, --keep-events 1 or more")
        if not 0 < self.heartbeat_s * 2 <= self.lease_s <= 3600:
            raise BadSetting("--lease is at least two heartbeats and at most 3600 seconds")
        try:
            parse_failpoints(self.failpoints)
        except BadFailpoint as error:
            raise BadSetting(f"HOTWEIGHTS_FAILPOINTS: {error}") from error

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise BadSetting(f"{given} goes with {missing}, which is not given")
        if self.client_ca and not self.tls_cert:
            raise BadSetting("--client-ca asks for client certificates, which takes --tls-cert and --tls-key")
        if self.endpoint.tls and not self.tls_cert:
            raise BadSetting(f"{self.endpoint} is TLS, which takes --tls-cert and --tls-key")
        if self.endpoint.path and self.tls_cert:
            raise BadSetting(f"{self.endpoint} is a socket of this machine, which takes no --tls-cert")


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


def default_tokens(environ: Mapping[str, str] | None = None) -> str:
    """HOTWEIGHTS_TOKENS; empty lets everyone in."""
    env = os.environ if environ is None else environ
    return env.get("HOTWEIGHTS_TOKENS", "")


def default_file(name: str, environ: Mapping[str, str] | None = None) -> Path | None:
    """The file that a variable names, if it does."""
    text = (os.environ if environ is None else environ).get(name, "").strip()
    return Path(text).expanduser() if text else None


def load_config(
    endpoint: str | None = None,
    store: str | None = None,
    tokens: str | None = None,
    *,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    client_ca: Path | None = None,
    **settings: float | bool,
) -> Config:
    """Settings given as arguments win over the environment. Raises BadSetting or BadEndpoint.

    With a certificate the endpoint is a TLS one however it was written.
    """
    config = Config(
        endpoint=parse_endpoint(endpoint or default_endpoint()),
        store=store or default_store(),
        tokens=default_tokens() if tokens is None else tokens,
        tls_cert=tls_cert or default_file("HOTWEIGHTS_TLS_CERT"),
        tls_key=tls_key or default_file("HOTWEIGHTS_TLS_KEY"),
        client_ca=client_ca or default_file("HOTWEIGHTS_CLIENT_CA"),
        failpoints=default_failpoints(),
        **settings,  # type: ignore[arg-type]
    )
    config.check()
    return replace(config, endpoint=replace(config.endpoint, tls=config.tls_cert is not None))
