"""The publisher's library against the real coordinator and a real agent."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.worker_client.agent.nodes import a_config, agent_of
from tests.worker_client.stage.checkpoints import make_folder

from hotweights.coordinator.config import Config as CoordinatorConfig
from hotweights.coordinator.server import Coordinator
from hotweights.publish import (
    publish_folder,
    publish_folder_async,
    publish_module_async,
    wait_copies_async,
    write_module,
)
from hotweights.publish.copies import TooFewCopies
from hotweights.v1 import model_pb2
from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.errors import Refused
from hotweights.worker_client.config import Config
from hotweights.worker_client.image.manifest import build_manifest


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("n")


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    coordinator = Coordinator(CoordinatorConfig(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:"))
    await coordinator.start()
    yield coordinator.endpoint
    await coordinator.stop()


@pytest.fixture
async def config(home: Path, endpoint: Endpoint) -> AsyncIterator[Config]:
    config = a_config(home, "a", str(endpoint))
    async with agent_of(config):
        yield config


async def test_a_published_folder_is_available_with_its_holder(home: Path, config: Config) -> None:
    folder = make_folder(home / "v1")
    version = await publish_folder_async(folder, model="m", version="v1", config=config, wait_copies=1, wait_s=10)
    assert list(version.holder_node_ids) == ["a"]
    assert version.state == model_pb2.VERSION_STATE_AVAILABLE
    assert version.manifest_digest == build_manifest(folder, bucket_bytes=65536).digest


async def test_the_same_bytes_again_are_the_same_version_and_other_bytes_are_refused(
    home: Path, config: Config
) -> None:
    first = await publish_folder_async(make_folder(home / "v1"), model="m", version="v1", config=config)
    again = await publish_folder_async(make_folder(home / "copy"), model="m", version="v1", config=config)
    assert (again.sequence, again.manifest_digest) == (first.sequence, first.manifest_digest)
    with pytest.raises(Refused, match=first.manifest_digest.hex()[:12]):
        await publish_folder_async(make_folder(home / "other", seed=2), model="m", version="v1", config=config)


async def test_copies_that_do_not_come_are_an_error_that_counts_them(
    home: Path, config: Config, endpoint: Endpoint
) -> None:
    await publish_folder_async(make_folder(home / "v1"), model="m", version="v1", config=config)
    with pytest.raises(TooFewCopies, match="1 of 2 copies") as error:
        await wait_copies_async(endpoint, "m", "v1", 2, deadline_s=1.0)
    assert list(error.value.version.holder_node_ids) == ["a"]
    with pytest.raises(Refused):
        await wait_copies_async(endpoint, "m", "v2", 1, deadline_s=1.0)


async def test_a_live_module_becomes_a_version(home: Path, config: Config) -> None:
    state = {"weight": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.zeros(3, dtype=np.float32)}
    version = await publish_module_async(
        state, model="m", version="step-1", folder=home / "step-1", files={"config.json": b"{}"}, config=config
    )
    assert version.tensor_count == 2
    assert version.manifest_digest == build_manifest(home / "step-1", bucket_bytes=65536).digest


async def test_the_plain_call_serves_a_trainer_without_a_loop(home: Path, config: Config) -> None:
    folder = make_folder(home / "v1")
    version = await asyncio.to_thread(publish_folder, folder, model="m", version="v1", config=config)
    assert version.name == "v1"


async def test_without_an_endpoint_nothing_is_started(home: Path) -> None:
    config = a_config(home, "a")
    with pytest.raises(Refused, match="HOTWEIGHTS_ENDPOINT"):
        await publish_folder_async(home, model="m", version="v1", config=config)
    assert not config.stage_dir.exists()


def test_what_is_written_reads_back_and_is_never_written_over(home: Path) -> None:
    state: dict[str, np.ndarray[Any, Any]] = {
        "a": np.ones((2, 2), dtype=np.float16),
        "b": np.zeros((0,), dtype=np.int64),
    }
    write_module(state, home / "v1")
    read = load_file(home / "v1" / "model.safetensors")
    assert {name: (value.dtype, value.tolist()) for name, value in read.items()} == {
        name: (value.dtype, value.tolist()) for name, value in state.items()
    }
    with pytest.raises(FileExistsError):
        write_module(state, home / "v1")


def test_tied_and_strided_tensors_are_written_each_with_bytes_of_its_own(home: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    table = torch.randn(8, 4, dtype=torch.bfloat16)
    state = {"embed": table, "head": table, "turned": table.t(), "part": table[2:4]}
    write_module(state, home / "v1")
    read = load_torch(home / "v1" / "model.safetensors")
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert read.keys() == state.keys()
