"""`config`: every setting of both sides, its value here and now, and where that came from."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hotweights.cli.arguments import Subparsers, add_command, add_json

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")


@dataclass(frozen=True)
class Row:
    """One line of what is printed."""

    side: str
    name: str
    value: str
    source: str
    meaning: str


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "config", config, "Print every setting, its value, and where it came from.")
    add_json(parser)


def config(arguments: argparse.Namespace) -> int:
    import dataclasses

    from hotweights.cli.output import Table, print_json, print_tables

    worker, coordinator = _worker_rows(), _coordinator_rows()
    if arguments.json:
        print_json([dataclasses.asdict(row) for row in worker + coordinator])
        return 0
    columns = ("SETTING", "VALUE", "FROM", "MEANING")
    tables = []
    for title, rows in (("worker side: agents, engines, publishers", worker), ("coordinator", coordinator)):
        table = Table(title, columns, empty="not installed here: pip install 'hotweights[coordinator]'")
        for row in rows:
            table.add(row.name, row.value, row.source, row.meaning)
        tables.append(table)
    print_tables(*tables)
    return 0


def _worker_rows() -> list[Row]:
    """Raises BadSetting, BadEndpoint."""
    from hotweights.cli.config import environment
    from hotweights.worker_client.config import SETTINGS, load_config

    environ = environment()
    read = load_config(environ)
    rows = []
    for setting in SETTINGS:
        value = getattr(read, setting.name.removeprefix("HOTWEIGHTS_").lower())
        # What is only known when an engine starts is shown as the table describes it.
        shown = _shown(setting.name, value) or setting.default
        rows.append(Row("worker", setting.name, shown, _source(environ, setting.name), setting.meaning))
    return rows


def _shown(name: str, value: object) -> str:
    if isinstance(value, Path):  # where a secret is, is none
        return str(value)
    if any(part in name for part in _SECRET):
        return "(set)" if value else ""
    if isinstance(value, dict):
        return ",".join(f"{old}={new}" for old, new in value.items())
    if isinstance(value, tuple):
        return (os.pathsep if any(isinstance(item, Path) for item in value) else ",").join(map(str, value))
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else str(value)


def _source(environ: "Mapping[str, str]", name: str) -> str:
    """The variable that gave the value, as config.py reads it."""
    if environ.get(name):
        return "environment"
    if name == "HOTWEIGHTS_ENDPOINT" and environ.get("HOTWEIGHTS_COORD"):
        return "HOTWEIGHTS_COORD"
    if name == "HOTWEIGHTS_AGENT_SOCKET" and environ.get("HOTWEIGHTS_STAGE_DIR"):
        return "HOTWEIGHTS_STAGE_DIR"
    return "default"


def _coordinator_rows() -> list[Row]:
    """What `coord-serve` would take without options; nothing where the coordinator is not installed."""
    import dataclasses

    from hotweights.cli.config import environment
    from hotweights.wire.endpoint import parse_endpoint

    try:
        from hotweights.coordinator.config import (
            Config,
            default_endpoint,
            default_failpoints,
            default_file,
            default_store,
            default_tokens,
        )
    except ModuleNotFoundError as error:
        if error.name != "platformdirs":
            raise
        return []
    environ = environment()
    config = Config(
        endpoint=parse_endpoint(default_endpoint(environ)),
        store=default_store(environ),
        tokens=default_tokens(environ),
        tls_cert=default_file("HOTWEIGHTS_TLS_CERT", environ),
        tls_key=default_file("HOTWEIGHTS_TLS_KEY", environ),
        client_ca=default_file("HOTWEIGHTS_CLIENT_CA", environ),
        failpoints=default_failpoints(environ),
    )
    meanings = {
        "endpoint": ("--endpoint", _source(environ, "HOTWEIGHTS_ENDPOINT"), "where it listens"),
        "store": ("--store", _source(environ, "HOTWEIGHTS_STORE"), "sqlite:PATH, or memory: for play"),
        "tokens": ("--tokens", _source(environ, "HOTWEIGHTS_TOKENS"), "file of who may do what; none lets everyone in"),
        "insecure": ("--insecure", "default", "allows an endpoint that other machines reach, in plaintext"),
        "keep_versions": ("--keep-versions", "default", "versions of a model beyond this go; 0 keeps all"),
        "keep_events": ("--keep-events", "default", "events kept for watchers"),
        "heartbeat_s": ("--heartbeat", "default", "seconds between two signs of life of a member"),
        "lease_s": ("--lease", "default", "seconds; a member not heard from for as long counts as gone"),
        "tls_cert": (
            "--tls-cert",
            _source(environ, "HOTWEIGHTS_TLS_CERT"),
            "PEM file; with it the endpoint is grpcs://",
        ),
        "tls_key": ("--tls-key", _source(environ, "HOTWEIGHTS_TLS_KEY"), "PEM file"),
        "client_ca": ("--client-ca", _source(environ, "HOTWEIGHTS_CLIENT_CA"), "PEM file; whose clients are let in"),
        "stop_grace_s": ("stop_grace_s", "fixed", "seconds that calls are given when it stops"),
        "failpoints": (
            "HOTWEIGHTS_FAILPOINTS",
            _source(environ, "HOTWEIGHTS_FAILPOINTS"),
            "for tests: failures to inject",
        ),
    }
    rows = []
    for name in (item.name for item in dataclasses.fields(Config)):
        option, source, meaning = meanings.get(name, (name, "default", ""))
        rows.append(Row("coordinator", option, _shown(name.upper(), getattr(config, name)), source, meaning))
    return rows
