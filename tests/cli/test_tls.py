"""The command line over grpcs:// with client certificates, from the coordinator to the commit of an update."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.agents import end_agent
from tests.certificates import Authority, Files

from hotweights.wire.access import Access
from hotweights.worker_client.config import load_config

from .processes import Node, Serving, one_line, start_agent, start_coordinator, stop
from .stand_in import StandIn

SECRET = "hw-secret-word"


@dataclass
class Place:
    serving: Serving
    ours: Authority
    client: Files

    @property
    def node(self) -> Node:
        return self.serving.node


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A coordinator that wants client certificates, and a node that has one by its environment."""
    folder = Path(tempfile.mkdtemp(prefix="hw-tls-"))
    ours = Authority(folder)
    server, client = ours.issue("server"), ours.issue("client")
    node = Node(folder, client.environment)
    tls = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--client-ca", str(ours.file))
    serving = start_coordinator(node, "--store", "memory:", *tls)
    yield Place(serving, ours, client)
    assert stop(serving.process) == 0, serving.log()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def agent(place: Place) -> Iterator[Serving]:
    process = start_agent(place.serving)
    yield place.serving
    assert stop(process) == 0


def test_it_says_grpcs_and_until_when_its_certificate_is_good(place: Place) -> None:
    assert place.serving.first_line.startswith("coordinator at grpcs://127.0.0.1:")
    assert "server.pem is valid until 3000-01-01" in place.serving.log()


def test_a_publication_over_mutual_tls_becomes_an_update_and_is_committed(
    agent: Serving, place: Place, checkpoints: dict[str, Path]
) -> None:
    first = agent.json("publish", str(checkpoints["v1"]), "--model", "m", "--version", "v1")
    access = Access(place.client.ca, place.client.cert, place.client.key)
    with StandIn(agent.endpoint, "m", first["manifest_digest"], access):
        done = agent.json("publish", str(checkpoints["v2"]), "--model", "m", "--version", "v2", "--update", "--wait")
        assert done["update"]["phase"] == "UPDATE_PHASE_COMMITTED"
        assert agent.json("rollback")["target_version"] == "v1"
    assert "tcps://127.0.0.1:" in agent.text("coord-status")


def test_every_command_that_looks_works(agent: Serving, checkpoints: dict[str, Path]) -> None:
    assert agent.text("coord-health") == f"coordinator {agent.endpoint}: serving\n"
    for command in (["coord-status"], ["versions"], ["events"], ["verify", str(checkpoints["v1"]), "--version", "v1"]):
        assert agent.text(*command)


def test_options_take_the_place_of_the_environment(place: Place) -> None:
    bare = Node(place.node.folder)
    told = ("--endpoint", place.serving.endpoint, *place.client.options)
    for command in (["coord-health"], ["versions"], ["versions", "delete", "m", "none"]):
        assert "certificate" not in bare.run(*command, *told).stderr
    done = bare.run("coord-status", "--json", *told)
    assert done.returncode == 0, done.stderr


def test_a_client_that_is_not_let_in_hears_why_in_one_line(place: Place) -> None:
    endpoint = place.serving.endpoint
    strangers = Authority(place.node.folder, "strangers")
    stranger, over = strangers.issue("stranger"), place.ours.issue("over", ends=2001)
    ours, plain = str(place.ours.file), endpoint.replace("grpcs", "tcp")
    bare = Node(place.node.folder)
    for arguments, said in (
        (["--endpoint", endpoint], "name its authority with --ca"),
        (["--endpoint", endpoint, "--ca", str(strangers.file)], "strangers.pem did not sign it"),
        (["--endpoint", endpoint, "--ca", ours], "wants a client certificate"),
        (["--endpoint", endpoint, *stranger.options, "--ca", ours], "does not accept"),
        (["--endpoint", plain], "if it speaks TLS, write grpcs://"),
    ):
        done = bare.run("coord-status", *arguments)
        assert (done.returncode, said in one_line(done.stderr)) == (1, True), (arguments, done.stderr)
    assert "name its authority with --ca" in one_line(bare.run("coord-health", "--endpoint", endpoint).stderr)
    for arguments, said in (
        (["--endpoint", endpoint, *over.options], "certificate has expired"),
        (["--endpoint", endpoint, "--ca", "/nowhere/ca.pem"], "/nowhere/ca.pem cannot be read"),
        (["--endpoint", endpoint, "--cert", str(place.client.cert)], "HOTWEIGHTS_KEY, which is not set"),
        (["--endpoint", plain, "--ca", ours], "--ca goes with grpcs://HOST:PORT"),
    ):
        done = bare.run("coord-status", *arguments)
        assert (done.returncode, said in one_line(done.stderr)) == (2, True), (arguments, done.stderr)


def test_an_agent_with_files_that_are_no_good_ends_with_one_line(place: Place) -> None:
    over = place.ours.issue("agents-over", ends=2001)
    node = Node(place.node.folder / "bad", over.environment)
    node.folder.mkdir()
    for settings in ({}, {"HOTWEIGHTS_CERT": "", "HOTWEIGHTS_KEY": "", "HOTWEIGHTS_CA": "/nowhere/ca.pem"}):
        done = node.run("agent", "--endpoint", place.serving.endpoint, **settings)
        assert done.returncode == 2, done.stderr
        assert ("certificate has expired" if not settings else "cannot be read") in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tls-cert", "/nowhere/a.pem"], "--tls-cert goes with --tls-key"),
        (["--tls-cert", "/nowhere/a.pem", "--tls-key", "/nowhere/a.key"], "/nowhere/a.pem cannot be read"),
        (["--endpoint", "grpcs://0.0.0.0:0"], "which takes --tls-cert and --tls-key"),
        (["--client-ca", "/nowhere/ca.pem"], "--client-ca asks for client certificates"),
    ],
)
def test_a_coordinator_with_files_that_are_no_good_ends_with_one_line_and_2(
    place: Place, arguments: list[str], said: str
) -> None:
    done = Node(place.node.folder).run(
        "coord-serve", "--endpoint", "tcp://127.0.0.1:0", "--store", "memory:", *arguments
    )
    assert done.returncode == 2, done.stderr
    assert said in one_line(done.stderr.splitlines()[-1])


def test_the_coordinators_files_come_from_the_environment_too(place: Place) -> None:
    server = place.ours.issue("another")
    node = Node(place.node.folder / "env", place.client.environment)
    node.folder.mkdir()
    node.access |= {"HOTWEIGHTS_TLS_CERT": str(server.cert), "HOTWEIGHTS_TLS_KEY": str(server.key)}
    serving = start_coordinator(node, "--store", "memory:")
    try:
        assert serving.text("coord-health").startswith(f"coordinator {serving.endpoint}: serving")
    finally:
        assert stop(serving.process) == 0
    shown = {row["name"]: row["value"] for row in serving.json("config")}
    assert shown["--tls-cert"] == str(server.cert)
    assert shown["HOTWEIGHTS_KEY"] == str(place.client.key), "where a key is, is no secret"


def test_a_token_is_never_printed_nor_sent_in_plaintext_to_others(place: Place) -> None:
    node = Node(place.node.folder)
    done = node.run("config", HOTWEIGHTS_TOKEN=SECRET)
    assert "(set)" in done.stdout
    done = node.run("coord-status", HOTWEIGHTS_TOKEN=SECRET, HOTWEIGHTS_ENDPOINT="tcp://192.0.2.1:5555")
    assert done.returncode == 2
    assert "the token is not sent in plaintext to tcp://192.0.2.1:5555" in one_line(done.stderr)
    assert SECRET not in done.stdout + done.stderr


def test_an_agent_that_a_publisher_starts_has_its_files_and_no_secret_on_its_command_line(
    place: Place, checkpoints: dict[str, Path]
) -> None:
    node = Node(place.node.folder / "auto", place.client.environment)
    node.folder.mkdir()
    token = node.folder / "token"
    token.write_text(SECRET)
    serving = Serving(node, place.serving.process, place.serving.endpoint, "")
    try:
        told = ("--model", "solo", "--version", "v1", "--token-file", str(token))
        assert serving.json("publish", str(checkpoints["v1"]), *told)["name"] == "v1"
        config = load_config(node.environment())
        log = (config.stage_dir / "agent.log").read_text()
        assert "serves buckets at tcps://" in log
        assert SECRET not in log
        found = re.search(r"agent (\d+) of node", log)
        assert found is not None
        assert SECRET not in Path(f"/proc/{found[1]}/cmdline").read_text()
        environ = Path(f"/proc/{found[1]}/environ").read_text().split("\0")
        assert f"HOTWEIGHTS_TOKEN_FILE={token}" in environ
        assert not [line for line in environ if SECRET in line]
    finally:
        end_agent(load_config(node.environment()))
