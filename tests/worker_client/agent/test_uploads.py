"""An agent uploads a staged image once and lends it to its node's ranks; GPU memory is a double (`lent_memory`)."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from tests import lent_memory
from tests.worker_client.agent.nodes import a_config, agent_of, until
from tests.worker_client.stage.checkpoints import make_folder, make_image

from hotweights.adapters.mapped import MappedImage
from hotweights.transports.cuda_ipc import CudaError
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent import uploads
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import BadSetting, Config
from hotweights.worker_client.image.layout import Layout

LATER_S = 0.5
RANK = "replica-0"


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("n")


@pytest.fixture
def memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GPUs' memory: a file each that is lent."""
    folder = home / "gpu"
    folder.mkdir()
    lent_memory.pretend(monkeypatch, folder)
    monkeypatch.setattr("hotweights.worker_client.agent.lending.LATER_S", LATER_S)
    return folder


@pytest.fixture
def config(home: Path, memory: Path) -> Config:
    return a_config(home, "a", HOTWEIGHTS_USE_IPC_AGENT="1", HOTWEIGHTS_LEND_GPUS="all")


@pytest.fixture
async def agent(config: Config) -> AsyncIterator[AgentClient]:
    async with agent_of(config) as client:
        yield client


def held(memory: Path) -> list[Path]:
    return list(memory.iterdir())


async def staged(agent: AgentClient, folder: Path) -> bytes:
    digest = await agent.identify_folder(folder)
    await agent.stage(digest)
    await agent.map_image(digest, RANK)
    return digest


async def borrow(agent: AgentClient, digest: bytes, client_id: str = RANK) -> pb.BorrowImageResponse:
    """As an engine does."""
    while (found := await agent.borrow_image(digest, client_id, upload=True)).coming:
        assert not found.memories
    return found


def check_same(found: dict[str, torch.Tensor], folder: Path) -> None:
    there = dict(MappedImage(folder, {}))
    assert all(torch.equal(tensor, there[name]) for name, tensor in found.items())


async def test_a_staged_image_is_uploaded_once_for_all_who_borrow_it_and_freed_when_they_have_it(
    home: Path, agent: AgentClient, memory: Path
) -> None:
    folder = make_folder(home / "v1", tensor_bytes=100_001)
    digest = await staged(agent, folder)
    assert not held(memory), "nobody has asked for it"
    both = await asyncio.gather(borrow(agent, digest), borrow(agent, digest, "replica-1"))
    assert [told.device_uuid for told in both[0].memories] == [lent_memory.DEVICE]
    assert both[0].memories[0].handle == both[1].memories[0].handle
    assert len(held(memory)) == 1
    found = lent_memory.read(both[0], folder)
    assert len(found) == 4
    check_same(found, folder)
    await agent.return_image(digest, RANK)
    await asyncio.sleep(2 * LATER_S)
    assert held(memory), "one still reads it"
    await agent.return_image(digest, "replica-1")
    await until(lambda: not held(memory), "it was freed")
    assert (await borrow(agent, digest)).memories, "the next update uploads it anew"


async def test_several_gpus_have_a_part_each(home: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    names = lent_memory.pretend(monkeypatch, home / "gpu", [1 << 30] * 3)
    folder = make_folder(home / "v1", tensors=60, tensor_bytes=10_000)
    async with agent_of(config) as agent:
        borrowed = await borrow(agent, await staged(agent, folder))
        assert [told.device_uuid for told in borrowed.memories] == names
        sizes = [sum(part.size_bytes for part in told.ranges) for told in borrowed.memories]
        assert sum(sizes) == 600_000
        assert max(sizes) - min(sizes) <= 30_000
        assert len(lent_memory.read(borrowed, folder)) == 60
        check_same(lent_memory.read(borrowed, folder), folder)


async def test_half_of_what_is_free_is_left_and_what_has_no_room_is_not_lent(
    home: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent_memory.pretend(monkeypatch, home / "gpu", [450_000])
    folder = make_folder(home / "v1")
    async with agent_of(config) as agent:
        borrowed = await borrow(agent, await staged(agent, folder))
        assert len(lent_memory.read(borrowed, folder)) == 2
        check_same(lent_memory.read(borrowed, folder), folder)


@pytest.mark.parametrize("free_bytes", [0, 100_000])
async def test_where_nothing_has_room_nothing_is_lent_and_nothing_taken(
    home: Path, config: Config, memory: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    lent_memory.pretend(monkeypatch, memory, [free_bytes])
    async with agent_of(config) as agent:
        digest = await staged(agent, make_folder(home / "v1"))
        assert not (await borrow(agent, digest)).memories
        assert not held(memory)
        assert "no GPU has room for a part of it" in (config.stage_dir / "agent.log").read_text()


async def test_what_a_gpu_refuses_is_said_and_the_next_who_asks_has_another_try(
    home: Path, agent: AgentClient, config: Config, memory: Path
) -> None:
    digest = await staged(agent, make_folder(home / "v1"))

    class Full(lent_memory.Lent):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            raise CudaError("writing GPU memory", "CUDA_ERROR_ECC_UNCORRECTABLE")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotweights.transports.cuda_ipc.Lent", Full)
        assert not (await borrow(agent, digest)).memories
    log = (config.stage_dir / "agent.log").read_text()
    assert f"image {digest.hex()[:16]} is not lent, ranks have it from host memory: writing GPU memory" in log
    assert not held(memory)
    assert (await borrow(agent, digest)).memories


async def test_an_image_that_is_shorter_than_its_manifest_says_is_not_lent(
    home: Path, agent: AgentClient, config: Config, memory: Path
) -> None:
    digest = await staged(agent, make_folder(home / "v1"))
    path = config.stage_dir / digest.hex() / "model-1.safetensors"
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(1000)
    assert not (await borrow(agent, digest)).memories
    assert "ends before byte" in (config.stage_dir / "agent.log").read_text()
    assert not held(memory)


def slow(patch: pytest.MonkeyPatch, piece_s: float) -> None:
    class Slow(lent_memory.Lent):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            time.sleep(piece_s)
            super().write(offset, data)

    patch.setattr("hotweights.transports.cuda_ipc.Lent", Slow)
    patch.setattr(uploads, "PIECE_BYTES", 50_000)
    patch.setattr(uploads, "WAIT_S", 0.05)


async def test_who_asks_meanwhile_is_told_that_it_is_coming(
    home: Path, agent: AgentClient, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 0.1)
    digest = await staged(agent, make_folder(home / "v1"))
    assert (await agent.borrow_image(digest, RANK, upload=True)).coming
    assert len(held(memory)) == 1
    assert (await borrow(agent, digest)).memories


async def test_what_nobody_fetches_once_it_is_there_is_freed(
    home: Path, agent: AgentClient, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 0.1)
    digest = await staged(agent, make_folder(home / "v1"))
    assert (await agent.borrow_image(digest, RANK, upload=True)).coming
    await until(lambda: not held(memory), "it was freed")


@pytest.mark.parametrize("when", ["uploading", "lent"])
async def test_an_agent_that_ends_frees_everything(
    home: Path, config: Config, memory: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    slow(monkeypatch, 0.1 if when == "uploading" else 0.0)
    async with agent_of(config) as agent:
        digest = await staged(agent, make_folder(home / "v1"))
        if when == "uploading":
            assert (await agent.borrow_image(digest, RANK, upload=True)).coming
        else:
            assert (await borrow(agent, digest)).memories
        assert held(memory)
    assert not held(memory)


async def test_what_a_trainer_lends_is_not_uploaded_besides(home: Path, agent: AgentClient, memory: Path) -> None:
    digest = await staged(agent, make_folder(home / "v1"))
    trainers = pb.DeviceMemory(device_uuid=lent_memory.DEVICE, handle=bytes(64), seal=b"seal")
    lending = agent.lend_image(digest, [trainers], 60.0)
    assert await anext(lending) == 0
    assert [told.seal for told in (await borrow(agent, digest)).memories] == [b"seal"]
    assert not held(memory)
    await lending.aclose()


async def test_nothing_is_uploaded_for_who_may_not_have_it(home: Path, agent: AgentClient, memory: Path) -> None:
    digest = await staged(agent, make_folder(home / "v1"))
    assert not (await borrow(agent, bytes(32))).memories, "an image that is not here"
    with pytest.raises(Refused, match="a client's id takes"):
        await agent.borrow_image(digest, "")
    assert not held(memory)


async def test_who_is_in_a_hurry_has_nothing_uploaded_and_takes_what_is_there(
    home: Path, agent: AgentClient, memory: Path
) -> None:
    digest = await staged(agent, make_folder(home / "v1"))
    hurried = await agent.borrow_image(digest, RANK)
    assert not hurried.memories
    assert not hurried.coming
    assert not held(memory)
    await borrow(agent, digest, "replica-1")
    assert (await agent.borrow_image(digest, RANK)).memories


async def test_an_agent_that_is_not_told_to_lends_nothing(home: Path, config: Config, memory: Path) -> None:
    async with agent_of(dataclasses.replace(config, lend_gpus=())) as agent:
        assert not (await borrow(agent, await staged(agent, make_folder(home / "v1")))).memories
        assert not held(memory)


async def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(config: Config) -> None:
    other = lent_memory.DEVICE.replace("0", "9")
    with pytest.raises(BadSetting, match=f"there is no {other} here; takes all, or of {lent_memory.DEVICE}"):
        async with agent_of(dataclasses.replace(config, lend_gpus=(other,))):
            pass


@pytest.mark.parametrize(
    ("total", "rooms", "shares"),
    [
        (90, [100, 100, 100], [30, 30, 30]),
        (100, [100, 100, 100], [34, 33, 33]),
        (100, [10, 100, 40], [10, 50, 40]),
        (100, [10, 20], [10, 20]),
        (0, [5], [0]),
        (7, [], []),
    ],
)
def test_everyone_takes_the_same_as_far_as_there_is_room(total: int, rooms: list[int], shares: list[int]) -> None:
    assert uploads.even(total, rooms) == shares


def test_what_fits_nowhere_leaves_the_others_in(home: Path) -> None:
    large, small = (make_image(home / str(size), tensors=4, tensor_bytes=size).manifest for size in (100_000, 1000))
    for at, tensor in enumerate(small.tensors):
        tensor.size_bytes = 1000 if at != 1 else large.tensors[1].size_bytes
    layouts = uploads.laid_out(small, dict.fromkeys(("GPU-0", "GPU-1"), 50_000))
    assert sum(part.size_bytes for layout in layouts for part in layout.told.ranges) == 3000


@pytest.mark.parametrize("seed", range(20))
def test_no_tensor_is_cut_lies_twice_or_overlaps_another(home: Path, seed: int) -> None:
    manifest = make_image(home / "v", seed=seed, tensors=10, tensor_bytes=1000 + seed).manifest
    rooms = {f"GPU-{at}": 700 * (seed + 1) * (at + 1) for at in range(3)}
    layouts = uploads.laid_out(manifest, rooms)
    found: dict[tuple[str, int], str] = {}
    for layout in layouts:
        device, end = layout.told.device_uuid, Layout("").size_bytes
        assert layout.size_bytes <= rooms[device]
        for part in layout.told.ranges:
            assert part.memory_offset >= end
            end = part.memory_offset + part.size_bytes
            assert (part.memory_offset - part.file_offset) % 256 == 0
            for tensor in manifest.tensors:
                inside = part.file_offset <= tensor.offset < part.file_offset + part.size_bytes
                if manifest.files[tensor.file].name == part.file and inside:
                    assert tensor.offset + tensor.size_bytes <= part.file_offset + part.size_bytes
                    assert (part.file, tensor.offset) not in found
                    found[part.file, tensor.offset] = device
        assert end == layout.size_bytes
    fits = all(room > sum(tensor.size_bytes + 512 for tensor in manifest.tensors) for room in rooms.values())
    assert len(found) == len(manifest.tensors) or not fits
