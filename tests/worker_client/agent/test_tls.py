"""Agents over TLS: with the coordinator and with each other, by the same files."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.certificates import Authority, Files
from tests.coordinator.live import DEADLINE_S
from tests.worker_client.agent.nodes import SmallCoordinator, a_config, a_coordinator, agent_of, until
from tests.worker_client.stage.checkpoints import contents, make_folder

from hotweights.transports.errors import TlsFailed
from hotweights.v1 import worker_service_pb2
from hotweights.wire import certificates
from hotweights.wire.certificates import BadCertificate
from hotweights.worker_client.agent.certificates import peer_tls
from hotweights.worker_client.agent.data import DataPort
from hotweights.worker_client.agent.folders import Folders
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import Config
from hotweights.worker_client.stage.stage import Stage


class Place:
    def __init__(self, home: Path) -> None:
        self.home = home
        folder = home / "certificates"
        folder.mkdir()
        self.ours, self.others = Authority(folder), Authority(folder, "other")
        self.a, self.b, self.renewed = (self.ours.issue(name) for name in ("a", "b", "renewed"))
        self.stranger = self.others.issue("stranger")

    def config(self, node: str, files: Files, endpoint: str = "", **environ: str) -> Config:
        return a_config(self.home, node, endpoint, **files.environment, **environ)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("n"))


@pytest.fixture
async def coordinator(place: Place) -> AsyncIterator[SmallCoordinator]:
    """Over mutual TLS."""
    async with a_coordinator(place.ours.issue("coordinator")) as small:
        yield small


async def publish(client: AgentClient, folder: Path) -> bytes:
    digest: bytes = (await client.publish_folder(folder, "m", "v1")).manifest_digest
    return digest


async def test_an_image_goes_from_agent_to_agent_over_tls(place: Place, coordinator: SmallCoordinator) -> None:
    folder = make_folder(place.home / "v1", tensor_bytes=500_000)
    a, b = (place.config(name, files, coordinator.endpoint) for name, files in (("a", place.a), ("b", place.b)))
    async with agent_of(a) as source, agent_of(b):
        digest = await publish(source, folder)
        await coordinator.hears("a", "b")
        assert coordinator.hellos["a"].data_endpoint.startswith("tcps://127.0.0.1:")
        report = await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
        assert report.WhichOneof("event") == "staged", report
        assert contents(b.stage_dir / digest.hex()) == contents(folder)


async def test_a_renewed_certificate_is_shown_by_the_data_port_and_a_broken_one_is_not(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "TRY_AGAIN_S", 0.0)
    tls = peer_tls(place.config("a", place.a))
    assert tls is not None
    before = tls.server()
    assert tls.server() is before
    place.a.key.write_bytes(b"half")
    assert (tls.server(), "the old ones serve on" in caplog.text) == (before, True)
    place.a.become(place.renewed)
    assert tls.server() is not before
    async with ports(place, place.a, place.b) as (source, reader):
        await reach(reader, source)
        place.b.become(place.stranger)  # an authority that the source does not know
        with pytest.raises(TlsFailed, match="unknown ca"):
            await reach(reader, source)


@contextlib.asynccontextmanager
async def ports(place: Place, *shown: Files | None) -> AsyncIterator[list[DataPort]]:
    """Data ports of nodes that show these files, or none."""
    opened: list[tuple[DataPort, Stage]] = []
    for number, files in enumerate(shown):
        config = place.config(f"n{number}", files) if files else a_config(place.home, f"n{number}")
        stage = Stage(config.stage_dir, max_images=2)
        await asyncio.to_thread(stage.open)
        folders = Folders(stage.root / "served.json", config.bucket_bytes, lambda: None)
        port = DataPort(config.node, stage, folders, peer_tls(config))
        await port.start(config.listen, "")
        opened.append((port, stage))
    try:
        yield [port for port, _ in opened]
    finally:
        for port, stage in opened:
            await port.close()
            stage.close()


async def reach(reader: DataPort, source: DataPort) -> None:
    """Raises TlsFailed, at the first answer at the latest."""
    connection = await reader.connect(worker_service_pb2.Source(node_id="n0", data_endpoint=source.endpoint))
    await connection.close()


async def test_a_node_without_a_certificate_does_not_read_from_one_that_has_one(place: Place) -> None:
    async with ports(place, place.a, None) as (source, reader):
        with pytest.raises(TlsFailed, match="this node has no HOTWEIGHTS_CERT"):
            await reach(reader, source)
        await asyncio.wait_for(reach(source, reader), DEADLINE_S)  # loopback is plaintext's own


async def test_a_node_with_a_certificate_reads_no_plaintext_of_other_machines(place: Place) -> None:
    async with ports(place, place.a) as (reader,):
        source = worker_service_pb2.Source(node_id="far", data_endpoint="tcp://192.0.2.1:9")
        with pytest.raises(TlsFailed, match="serves in plaintext"):
            await reader.connect(source)


async def test_what_other_machines_reach_is_tls_where_the_coordinator_is(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for tls_only, files in ((True, None), (False, None), (True, place.a)):
            config = place.config("n", files) if files else a_config(place.home, "n")
            stage = Stage(config.stage_dir, max_images=2)
            folders = Folders(config.stage_dir / "served.json", config.bucket_bytes, lambda: None)
            port = DataPort("n", stage, folders, peer_tls(config))
            if tls_only and files is None:
                with pytest.raises(ValueError, match="set HOTWEIGHTS_CERT and HOTWEIGHTS_KEY"):
                    await port.start("0.0.0.0:0", "127.0.0.1", tls_only=True)
                continue
            caplog.clear()
            await port.start("0.0.0.0:0", "127.0.0.1", tls_only=tls_only)
            assert ("travels in plaintext" in caplog.text) == (files is None)
            await port.close()


async def test_an_authority_may_be_commented_in_any_language_and_encoding(place: Place) -> None:
    pem = place.ours.file.read_bytes()
    place.ours.file.write_bytes("# Zertifizierungsstelle für \u4e2d\n".encode() + b"\xff\n" + pem + b"\xe9\n")
    async with ports(place, place.a, place.b) as (source, reader):
        await reach(reader, source)
        place.b.become(place.stranger)
        with pytest.raises(TlsFailed, match="unknown ca"):
            await reach(reader, source)


def test_certificates_that_are_no_good_end_an_agent_before_it_serves(place: Place) -> None:
    over = place.ours.issue("over", ends=2001)
    with pytest.raises(BadCertificate, match="certificate has expired"):
        peer_tls(place.config("a", over))


async def test_a_publisher_shows_its_own_token_through_the_agent(place: Place, coordinator: SmallCoordinator) -> None:
    """What a publisher may do is not what the node's agent may."""
    folder = make_folder(place.home / "v1")
    token = place.home / "agent.token"
    token.write_text("the-agents\n")
    config = place.config("a", place.a, coordinator.endpoint, HOTWEIGHTS_TOKEN_FILE=str(token))
    theirs = place.config("a", place.a, coordinator.endpoint, HOTWEIGHTS_TOKEN="the-publishers")
    async with agent_of(config) as own:
        await until(lambda: "a" in coordinator.hellos, "it said hello")
        client = AgentClient(theirs)
        await client.publish_folder(folder, "m", "v1")
        await client.close()
        await own.publish_folder(folder, "m", "v2")
    shown = [shown for method, shown in coordinator.shown if method == "PublishVersion"]
    assert shown == ["Bearer the-publishers", "Bearer the-agents"]
    assert ("Session", "Bearer the-agents") in coordinator.shown
    log = (config.stage_dir / "agent.log").read_text()
    assert "the-publishers" not in log
    assert "the-agents" not in log
