"""Roles as they are meant to be used: over mutual TLS, agents and engines as workers, trainers as publishers."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.certificates import Authority

from hotweights.worker_client.config import load_config

from .processes import Node, Serving, start_agent, start_coordinator, stop
from .stand_in import StandIn

ROLES = ("viewer", "worker", "publisher", "operator")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Serving]:
    """Of a node whose own token is a worker's; the others' are in files of their role's name."""
    folder = Path(tempfile.mkdtemp(prefix="hw-roles-"))
    authority = Authority(folder)
    server, client = authority.issue("server"), authority.issue("client")
    tokens = folder / "tokens"
    tokens.touch(0o600)
    for role in ROLES:
        line = Node(folder).run("token", role, f"the-{role}", "--out", str(folder / role)).stdout
        tokens.write_text(tokens.read_text() + line)
    node = Node(folder, {**client.environment, "HOTWEIGHTS_TOKEN_FILE": str(folder / "worker")})
    tls = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--client-ca", str(authority.file))
    serving = start_coordinator(node, "--store", "memory:", "--tokens", str(tokens), *tls)
    process = start_agent(serving)
    yield serving
    assert stop(process) == 0
    assert stop(serving.process) == 0, serving.log()
    shutil.rmtree(folder)


def test_a_version_goes_from_a_publisher_to_a_worker_by_an_operators_word(
    guarded: Serving, checkpoints: dict[str, Path]
) -> None:
    def shown_by(role: str) -> tuple[str, str]:
        return "--token-file", str(guarded.node.folder / role)

    def publish(name: str, role: str, *more: str) -> tuple[str, ...]:
        return "publish", str(checkpoints[name]), "--model", "m", "--version", name, *more, *shown_by(role)

    first = guarded.json(*publish("v1", "publisher"))
    # The viewer's is refused to the agent, which shows it in place of its own.
    for role, said in (("viewer", "PublishVersion takes a token of role publisher"), ("worker", "yours is a worker's")):
        assert said in guarded.refusal(*publish("v2", role))
    guarded.json(*publish("v2", "publisher"))
    access = load_config(guarded.node.environment()).access
    with StandIn(guarded.endpoint, "m", first["manifest_digest"], access):
        assert "takes a token of role operator" in guarded.refusal("update", "v2", *shown_by("publisher"))
        assert "committed to v2" in guarded.text("update", "v2", "--model", "m", *shown_by("operator"))
    said = guarded.text("events", "--last", "100", *shown_by("viewer"))
    assert "(publisher the-publisher)" in said
    log = guarded.log() + said + (guarded.node.folder / "agent.log").read_text()
    for role in ROLES:
        assert (guarded.node.folder / role).read_text().strip() not in log
