"""On a real GPU a trainer lends its weights, or an agent an image, to a rank: processes of their own."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.adapters.plain_worker import a_worker, an_image, prepared, until  # noqa: E402
from tests.worker_client.agent.nodes import a_config, agent_of  # noqa: E402

from hotweights.adapters.rank import Rank  # noqa: E402
from hotweights.adapters.torch_module import same_as_folder  # noqa: E402
from hotweights.coordinator.config import Config as CoordinatorConfig  # noqa: E402
from hotweights.coordinator.server import Coordinator  # noqa: E402
from hotweights.v1 import agent_service_pb2 as pb  # noqa: E402
from hotweights.wire.endpoint import parse_endpoint  # noqa: E402
from hotweights.worker_client.agent.lending import LATER_S  # noqa: E402
from hotweights.worker_client.agent_client import AgentClient, connect_or_start  # noqa: E402
from hotweights.worker_client.config import Config  # noqa: E402
from hotweights.worker_client.window.prepare import _plain  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WIDTH = 2048
TRAINER = """
import sys
from pathlib import Path
import torch
from hotweights.publish import publish_module
from hotweights.publish.lending import _loans
torch.manual_seed(7)
state = {name: torch.randn(2048, 2048, device="cuda") for name in ("one.weight", "two.weight")}
version = publish_module(state, model="m", version="v2", folder=Path(sys.argv[1]), lend=True)
for tensor in state.values():
    tensor.zero_()  # the next step of training
torch.cuda.synchronize()
print(version.manifest_digest.hex(), flush=True)
print(_loans["m"].wait(60), flush=True)
"""


@pytest.fixture
async def config(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Config]:
    home = tmp_path_factory.mktemp("n")
    coordinator = Coordinator(CoordinatorConfig(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:"))
    await coordinator.start()
    config = a_config(home, "a", str(coordinator.endpoint), HOTWEIGHTS_USE_IPC_AGENT="1")
    async with agent_of(config):
        yield config
    await coordinator.stop()


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    """On a GPU that is awake: waking it takes seconds, in which the agent of this process would lend nothing."""
    return Rank(a_worker(an_image(tmp_path / "v1", 1, WIDTH), "cuda", WIDTH))


@pytest.fixture
def trainer(config: Config, rank: Rank, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "v2")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **config.as_environ()},
    )
    yield process
    process.kill()
    process.communicate(timeout=60)


async def test_a_rank_takes_what_a_trainer_lends_and_the_trainer_gets_its_memory_back(
    config: Config, rank: Rank, trainer: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    assert trainer.stdout is not None
    engine = AgentClient(config)
    digest = bytes.fromhex(await asyncio.to_thread(trainer.stdout.readline))
    await engine.stage(digest)
    folder = await engine.map_image(digest, "replica-0")
    borrowed = await engine.borrow_image(digest, "replica-0")
    lent = {"left_s": borrowed.left_s, "memories": [_plain(memory) for memory in borrowed.memories]}
    held = await asyncio.to_thread(prepared, rank, folder, tmp_path / "v1", lent=lent)
    assert held.made.routes.sources == (f"cuda-ipc: 32 MiB of {borrowed.memories[0].device_uuid} of another process",)
    rank.apply(folder)
    rank.prove_written()
    assert same_as_folder(rank.model, folder, {})
    assert until(rank.release)
    await engine.return_image(digest, "replica-0")
    assert (await asyncio.to_thread(trainer.stdout.readline)).strip() == "True"
    await engine.close()


@pytest.fixture
def lending_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """In a process of its own: CUDA opens no handle where it was made."""
    config = a_config(tmp_path_factory.mktemp("n"), "a", HOTWEIGHTS_USE_IPC_AGENT="1", HOTWEIGHTS_LEND_GPUS="all")
    process = subprocess.Popen(  # one that a client started lends nothing
        [sys.executable, "-m", "hotweights.cli", "agent"], env={**os.environ, **config.as_environ()}
    )
    yield config
    process.terminate()
    assert process.wait(timeout=60) == 0


async def borrow(engine: AgentClient, digest: bytes) -> pb.BorrowImageResponse:
    while (found := await engine.borrow_image(digest, "replica-0", upload=True)).coming:
        pass
    return found


async def test_a_rank_takes_what_an_agent_lends_and_what_was_returned_is_freed(
    lending_agent: Config, rank: Rank, tmp_path: Path
) -> None:
    image = an_image(tmp_path / "v2", 2, WIDTH)
    engine = await connect_or_start(lending_agent)
    digest = await engine.identify_folder(image)
    await engine.stage(digest)
    folder = await engine.map_image(digest, "replica-0")
    seals: set[bytes] = set()
    for _ in range(2):
        borrowed = await borrow(engine, digest)
        (memory,) = borrowed.memories
        assert memory.seal not in seals, "it was uploaded anew"
        seals.add(memory.seal)
        lent = {"left_s": borrowed.left_s, "memories": [_plain(memory)]}
        held = await asyncio.to_thread(prepared, rank, folder, tmp_path / "v1", lent=lent)
        assert held.made.routes.sources == (f"cuda-ipc: 32 MiB of {memory.device_uuid} of another process",)
        rank.apply(folder)
        rank.prove_written()
        assert same_as_folder(rank.model, folder, {})
        rank.undo()
        rank.prove_undone()
        assert same_as_folder(rank.model, tmp_path / "v1", {})
        assert until(rank.release)
        await engine.return_image(digest, "replica-0")
        await asyncio.sleep(LATER_S + 1)
    await engine.close()
