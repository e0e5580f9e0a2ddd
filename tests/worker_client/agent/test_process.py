"""The agent as a process: killed in the middle, started twice at once, ended by a signal."""

import asyncio
import contextlib
import ctypes.util
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.worker_client.agent.nodes import SmallCoordinator, a_config, a_coordinator, agent_of, until
from tests.worker_client.stage.checkpoints import contents, make_folder

from hotweights.v1 import agent_service_pb2 as pb
from hotweights.wire.errors import Unreachable
from hotweights.worker_client.agent.data import DataPort
from hotweights.worker_client.agent_client import AgentClient, connect_or_start
from hotweights.worker_client.config import Config
from hotweights.worker_client.image.manifest import build_manifest

END_S = 15.0


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("n")


@pytest.fixture
async def coordinator() -> AsyncIterator[SmallCoordinator]:
    async with a_coordinator() as small:
        yield small


def start(config: Config) -> "subprocess.Popen[bytes]":
    """An agent as an operator starts it."""
    settings = {**os.environ, **config.as_environ()}
    command = [sys.executable, "-m", "hotweights.cli", "agent"]
    return subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def answered(config: Config) -> pb.GetAgentStatusResponse:
    client = AgentClient(config)
    try:
        return await client.status()
    finally:
        await client.close()


async def ended(pid: int) -> None:
    """Of a process that is not ours to wait for."""

    def gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    await until(gone, f"process {pid} ended")


class SlowSource:
    """Stands between the data port and its readers: counts, and holds back after `free` buckets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.sent: list[tuple[int, int, int]] = []
        self.gate = asyncio.Event()
        self._free = free
        self._loop = asyncio.get_running_loop()
        original = DataPort.open

        def open_slowly(port: DataPort, image: bytes, file: int, offset: int, size: int) -> memoryview:
            if len(self.sent) >= self._free and not self.gate.is_set():
                asyncio.run_coroutine_threadsafe(self.gate.wait(), self._loop).result(END_S)
                raise OSError("the reader is gone")
            self.sent.append((file, offset, size))
            return original(port, image, file, offset, size)

        monkeypatch.setattr(DataPort, "open", open_slowly)


async def test_killed_in_the_middle_of_a_transfer_it_resumes_and_fetches_only_what_is_missing(
    home: Path, coordinator: SmallCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(home / "v1", tensor_bytes=500_000)
    image = build_manifest(folder, bucket_bytes=65536)
    slow = SlowSource(monkeypatch, free=12)
    reader = a_config(home, "b", coordinator.endpoint)
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as source:
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        process = start(reader)
        await coordinator.hears("a", "b")
        coordinator.stage("b", digest, "a")
        await until(lambda: len(slow.sent) == 12, "twelve buckets went out")
        # The last of them may be on their way still: those that are reported are in place.
        await until(lambda: bool(coordinator.reports["b"]), "progress is reported")
        await asyncio.sleep(0.5)
        process.kill()
        process.wait(END_S)
        assert (reader.stage_dir / f"{digest.hex()}.partial").is_dir()
        before = list(slow.sent)
        slow.gate.set()
        await until(lambda: "b" not in coordinator.hellos, "it left")
        process = start(reader)
        try:
            await coordinator.hears("b")
            slow.sent.clear()
            report = await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
            assert report.WhichOneof("event") == "staged", report
            fetched = sum(size for _, _, size in slow.sent)
            assert len(set(before)) == 12
            assert fetched == image.size_bytes - sum(size for _, _, size in before)
            assert not set(before) & set(slow.sent)
            assert contents(reader.stage_dir / digest.hex()) == contents(folder)
        finally:
            process.terminate()
            assert process.wait(END_S) == 0


async def test_two_clients_that_start_an_agent_at_once_get_the_same_one(home: Path) -> None:
    config = a_config(home, "a")
    one, two = await asyncio.gather(connect_or_start(config), connect_or_start(config))
    pid = (await one.status()).pid
    assert (await two.status()).pid == pid
    assert os.getsid(pid) != os.getsid(0), "it lives in a session of its own"
    for number in (0, 1, 2):
        assert not os.readlink(f"/proc/{pid}/fd/{number}").startswith(("/dev/pts", "pipe:"))
    await one.close()
    await two.close()
    os.kill(pid, signal.SIGTERM)
    await ended(pid)
    assert not config.agent_socket.exists()
    assert "ended" in (config.stage_dir / "agent.log").read_text()


async def test_an_agent_gives_way_as_far_as_it_is_told(home: Path) -> None:
    config = a_config(home, "a", HOTWEIGHTS_NICE="7")
    client = await connect_or_start(config)
    pid = (await client.status()).pid
    await client.close()
    assert os.getpriority(os.PRIO_PROCESS, pid) == max(7, os.getpriority(os.PRIO_PROCESS, 0))
    os.kill(pid, signal.SIGTERM)
    await ended(pid)


@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")
async def test_agents_that_move_buckets_over_ucx_end_when_they_are_told(
    home: Path, coordinator: SmallCoordinator
) -> None:
    """The libraries of UCX keep threads of their own."""
    settings = {"HOTWEIGHTS_TRANSPORT": "ucx", "HOTWEIGHTS_UCX_TLS": "tcp,self"}
    configs = [a_config(home, node, coordinator.endpoint, **settings) for node in ("a", "b")]
    clients = [await connect_or_start(config) for config in configs]
    digest = (await clients[0].publish_folder(make_folder(home / "v1"), "m", "v1")).manifest_digest
    await coordinator.hears("a", "b")
    number = coordinator.stage("b", digest, "a")
    assert (await coordinator.outcome("b", number)).staged.manifest_digest == digest
    pids = [(await client.status()).pid for client in clients]
    for client, pid in zip(clients, pids, strict=True):
        await client.close()
        os.kill(pid, signal.SIGTERM)
    for pid in pids:
        await ended(pid)


async def test_a_client_lives_through_the_agents_death_and_has_another_started(home: Path) -> None:
    config = a_config(home, "a", HOTWEIGHTS_AGENT_IDLE_S="3")
    client = await connect_or_start(config)
    digest = await client.identify_folder(make_folder(home / "v1"))
    await client.stage(digest)
    await client.map_image(digest, "replica-0")
    first = (await client.status()).pid
    os.kill(first, signal.SIGKILL)
    await ended(first)
    try:
        second = first
        for _ in range(3):  # each attempt has a deadline of its own
            with contextlib.suppress(Unreachable):
                second = (await client.status()).pid
                break
        assert second != first
        await client.map_image(digest, "replica-0")
        images = (await client.status()).images
        assert [(image.manifest_digest, list(image.client_ids)) for image in images] == [(digest, ["replica-0"])]
    finally:
        await client.close()
        os.kill((await answered(config)).pid, signal.SIGTERM)


async def test_an_agent_that_cannot_start_is_reported_with_its_own_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.worker_client.agent_client.START_DEADLINE_S", 5.0)
    config = a_config(home, "a", HOTWEIGHTS_LISTEN="0.0.0.0:0")
    with pytest.raises(Unreachable, match="HOTWEIGHTS_ADVERTISE"):
        await connect_or_start(config)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a CUDA driver here")
def test_an_agent_that_is_to_lend_gpu_memory_where_there_is_none_says_so(home: Path) -> None:
    settings = {**os.environ, **a_config(home, "a").as_environ()}
    command = [sys.executable, "-m", "hotweights.cli", "agent", "--lend-gpus", "all"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 2
    assert done.stderr.startswith("hotweights: HOTWEIGHTS_LEND_GPUS='all': there is no CUDA driver here: ")
    assert done.stderr.count("\n") == 1


async def test_an_agent_that_a_client_started_lends_no_gpu_memory(home: Path) -> None:
    """It sees the GPUs of that client, and is there where there are none."""
    config = a_config(home, "a", HOTWEIGHTS_LEND_GPUS="all")
    client = await connect_or_start(config)
    try:
        assert (await client.status()).node_id == "a"
    finally:
        await client.close()
        os.kill((await answered(config)).pid, signal.SIGTERM)
