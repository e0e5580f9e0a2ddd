"""Three agents that `mpirun` started, as `hotweights agent` on three nodes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.transports.test_mpi import MPIRUN, needs_mpi
from tests.worker_client.agent.nodes import CELL_S, SmallCoordinator, a_config, a_coordinator, until
from tests.worker_client.stage.checkpoints import contents, make_folder, touch_bytes

from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import Config

pytestmark = [needs_mpi, pytest.mark.timeout(120)]

NODES = ("a", "b", "c")


class Job:
    """Their clients, by node, and the process of `mpirun`."""

    def __init__(self, configs: dict[str, Config], process: asyncio.subprocess.Process) -> None:
        self.agents = {node: AgentClient(config) for node, config in configs.items()}
        self.process = process

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), CELL_S)


@contextlib.asynccontextmanager
async def a_job(home: Path, coordinator: SmallCoordinator) -> AsyncIterator[Job]:
    configs = {node: a_config(home, node, coordinator.endpoint, HOTWEIGHTS_TRANSPORT="mpi") for node in NODES}
    command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    for config in configs.values():
        settings = {name: value for name, value in config.as_environ().items() if value}
        command += [":"] if config is not configs["a"] else []
        command += ["-n", "1", *(part for name, value in settings.items() for part in ("-x", f"{name}={value}"))]
        command += [sys.executable, "-m", "hotweights.cli", "agent"]
    with (home / "mpirun.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        job = Job(configs, process)
        try:
            await until(lambda: all(node in coordinator.hellos for node in NODES), "all three said hello")
            yield job
        finally:
            for agent in job.agents.values():
                await agent.close()
            if process.returncode is None:
                process.terminate()
            await job.ended()


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short: a socket's path has at most 99 bytes."""
    return tmp_path_factory.mktemp("m")


def ways(coordinator: SmallCoordinator, node: str, number: int) -> list[str]:
    said = [report.stage_progress for report in coordinator.reports[node] if report.number == number]
    return [progress.transport for progress in said if progress.transport]


async def test_a_version_is_broadcast_to_all_nodes_and_the_next_comes_as_what_changed(home: Path) -> None:
    first, second = (make_folder(home / name, tensor_bytes=4_000_000) for name in ("v1", "v2"))
    touch_bytes(second / "model-1.safetensors", 1000)
    async with a_coordinator() as coordinator, a_job(home, coordinator) as job:
        for folder in (first, second):
            digest = (await job.agents["a"].publish_folder(folder, "m", folder.name)).manifest_digest
            numbers = {
                "b": coordinator.stage("b", digest, "a"),
                "c": coordinator.stage("c", digest, "b", "a", staging="b"),
            }
            for node, number in numbers.items():
                assert (await coordinator.outcome(node, number)).staged.manifest_digest == digest
                found = ways(coordinator, node, number)
                assert ("mpi" if folder is first else "tcp (deltas go to whom they are for)") in found
                assert contents(await job.agents[node].map_image(digest, "replica-0")) == contents(folder)
        job.process.send_signal(signal.SIGTERM)
        await job.ended()
    for node in NODES:
        assert "ended" in (home / node / "agent.log").read_text().splitlines()[-1]


async def test_an_agent_that_dies_ends_the_job_and_what_was_staged_is_there_for_the_next(home: Path) -> None:
    folder = make_folder(home / "v1", tensor_bytes=400_000)
    async with a_coordinator() as coordinator:
        async with a_job(home, coordinator) as job:
            digest = (await job.agents["a"].publish_folder(folder, "m", "v1")).manifest_digest
            await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
            os.kill((await job.agents["c"].probe()).pid, signal.SIGKILL)
            assert await job.ended() != 0
        await until(lambda: not coordinator.hellos, "all are gone")
        async with a_job(home, coordinator) as job:
            await until(lambda: coordinator.holders(digest) == ["a", "b"], "both hold it")
            assert (
                await coordinator.outcome("c", coordinator.stage("c", digest, "b"))
            ).staged.manifest_digest == digest
            assert contents(await job.agents["c"].map_image(digest, "replica-0")) == contents(folder)
