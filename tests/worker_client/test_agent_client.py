"""Whom a client of the agent believes: not everybody who listens where an agent would."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.worker_client.agent.nodes import a_config, agent_of
from tests.worker_client.stage.checkpoints import make_folder

from hotweights.wire.errors import Refused, Unreachable
from hotweights.worker_client.agent_client import AgentClient, connect_or_start
from hotweights.worker_client.config import Config, load_config
from hotweights.worker_client.stage.errors import StageUnsafe

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
OTHER = 54321
TOKEN = "a-token-that-nobody-else-may-see"


@pytest.fixture
def home() -> Iterator[Path]:
    """As /dev/shm; short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="hw-client-") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@asynccontextmanager
async def listening(socket: Path) -> AsyncIterator[list[bytes]]:
    """Somebody at the socket; what he was sent, a text of each connection."""
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(b"")
        while part := await reader.read(1 << 16):
            heard[-1] += part
        writer.close()

    server = await asyncio.start_unix_server(hear, socket)
    try:
        yield heard
    finally:
        server.close()


async def publish(config: Config, folder: Path) -> None:
    client = AgentClient(config)
    try:
        await client.publish_folder(folder, "m", "v1")
    finally:
        await client.close()


def with_token(home: Path, **environ: str) -> Config:
    return a_config(home, "a", HOTWEIGHTS_TOKEN=TOKEN, **environ)


@as_root
async def test_nothing_is_sent_to_who_made_our_stage_before_us(home: Path) -> None:
    config = with_token(home)
    config.stage_dir.mkdir()
    async with listening(config.agent_socket) as heard:
        for path in (config.stage_dir, config.agent_socket):
            os.chown(path, OTHER, OTHER)
        with pytest.raises(Refused, match=f"belongs to user {OTHER}") as refused:
            await publish(config, make_folder(home / "v1"))
        assert refused.value.reason == "SOCKET_UNSAFE"
        with pytest.raises(Refused, match="cannot be trusted"):
            await connect_or_start(config)
        assert heard == []


@pytest.mark.parametrize("mode", [0o777, 0o1777])
async def test_nothing_is_sent_to_a_socket_in_a_folder_where_everybody_may_listen(home: Path, mode: int) -> None:
    os.chmod(home, mode)
    config = with_token(home, HOTWEIGHTS_AGENT_SOCKET=str(home / "agent.sock"))
    async with listening(config.agent_socket) as heard:
        with pytest.raises(Refused, match="everybody may") as refused:
            await publish(config, make_folder(home / "v1"))
        assert refused.value.reason == "SOCKET_UNSAFE"
        assert heard == []


@as_root
async def test_a_socket_that_is_named_in_another_users_own_folder_is_believed(home: Path) -> None:
    run = home / "run"
    run.mkdir()  # ours, for one user's agent
    (run / "hw").mkdir()
    config = with_token(home, HOTWEIGHTS_AGENT_SOCKET=str(run / "hw" / "agent.sock"))
    async with agent_of(config) as client:
        for path in (run / "hw", config.agent_socket):
            os.chown(path, OTHER, OTHER)
        assert (await client.probe()).node_id == "a"


@as_root
async def test_a_sidecar_of_another_user_is_believed_in_the_pods_volume(home: Path) -> None:
    os.chmod(home, 0o777)  # as the kubelet makes it
    config = with_token(home, KUBERNETES_SERVICE_HOST="10.0.0.1")
    async with agent_of(config) as client:
        for path in (config.stage_dir, config.agent_socket):
            os.chown(path, OTHER, OTHER)
        assert (await client.probe()).node_id == "a"


async def test_outside_a_pod_an_agent_does_not_stage_where_everybody_may_replace_it(home: Path) -> None:
    os.chmod(home, 0o777)
    with pytest.raises(StageUnsafe, match="everybody may write"):
        async with agent_of(a_config(home, "a")):
            pytest.fail("it runs")


async def test_where_no_folder_is_nobody_listens_and_nobody_is_waited_for(home: Path) -> None:
    client = AgentClient(a_config(home, "a"))
    with pytest.raises(Unreachable, match="No such file"):
        await asyncio.wait_for(client.status(), 5)
    await client.close()


def test_the_default_stage_lies_in_no_folder_of_another_user() -> None:
    parent = load_config({}).stage_dir.parent
    assert parent.stat().st_uid in (0, os.getuid())
