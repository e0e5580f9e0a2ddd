"""A trainer lends its weights to engines of its node, through a real agent; GPU memory is a double (`lent_memory`)."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import lent_memory
from tests.lent_memory import DEVICE, OnGpu
from tests.worker_client.agent.nodes import a_config, agent_of

from hotweights.coordinator.config import Config as CoordinatorConfig
from hotweights.coordinator.server import Coordinator
from hotweights.publish import lending, publish_module_async
from hotweights.publish.lending import DeviceCopy
from hotweights.transports.cuda_ipc import CudaError
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import model_pb2
from hotweights.wire.endpoint import parse_endpoint
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import Config

DEADLINE_S = 15.0


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("n")


@pytest.fixture
def memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GPU: a file each that is lent."""
    folder = home / "gpu"
    folder.mkdir()
    lent_memory.pretend(monkeypatch, folder)
    monkeypatch.setattr("hotweights.worker_client.agent.lending.LATER_S", 0.3)
    return folder


@pytest.fixture
async def config(home: Path, memory: Path) -> AsyncIterator[Config]:
    coordinator = Coordinator(CoordinatorConfig(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:"))
    await coordinator.start()
    config = a_config(home, "a", str(coordinator.endpoint), HOTWEIGHTS_USE_IPC_AGENT="1")
    async with agent_of(config):
        yield config
        for loan in lending._loans.values():
            await asyncio.to_thread(loan.end)
    await coordinator.stop()


def state(seed: int = 1, **others: torch.Tensor) -> dict[str, object]:
    """Odd sizes, and one tensor that is on no GPU in the middle of the file."""
    torch.manual_seed(seed)
    on_gpu = {"a": torch.randn(33, 7), "b": torch.randn(5).bfloat16(), "d": torch.randn(1024)}
    return {**{name: OnGpu(tensor) for name, tensor in on_gpu.items()}, "c": torch.randn(3), **others}


def held(memory: Path) -> list[Path]:
    return list(memory.iterdir())


async def until(holds: Callable[[], bool]) -> None:
    ends = asyncio.get_running_loop().time() + DEADLINE_S
    while not holds():
        assert asyncio.get_running_loop().time() < ends
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def an_engine(config: Config) -> AsyncIterator[AgentClient]:
    client = AgentClient(config)
    try:
        yield client
    finally:
        await client.close()


async def test_what_a_trainer_publishes_is_lent_to_the_engines_of_its_node_until_they_have_it(
    home: Path, config: Config, memory: Path
) -> None:
    version = await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config)
    async with an_engine(config) as engine:
        borrowed = await engine.borrow_image(version.manifest_digest, "replica-0")
        assert [told.device_uuid for told in borrowed.memories] == [DEVICE]
        assert 590 < borrowed.left_s <= 600
        found = lent_memory.read(borrowed, home / "v1")
        assert set(found) == {"a", "b", "d"}
        written = load_file(home / "v1" / "model.safetensors")
        assert all(torch.equal(tensor, written[name]) for name, tensor in found.items())
        await engine.borrow_image(version.manifest_digest, "replica-1")
        await until(lambda: lending._loans["m"].borrowers == 2)
        await engine.return_image(version.manifest_digest, "replica-0")
        await until(lambda: lending._loans["m"].borrowers == 1)
        await asyncio.sleep(0.5)
        assert held(memory), "one still reads it"
        await engine.return_image(version.manifest_digest, "replica-1")
        await until(lambda: lending._loans["m"].is_over)
        assert not held(memory)
        assert not (await engine.borrow_image(version.manifest_digest, "replica-2")).memories


async def test_engines_that_are_not_to_borrow_do_not(home: Path, config: Config, memory: Path) -> None:
    version = await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config)
    async with an_engine(dataclasses.replace(config, use_ipc_agent=False)) as engine:
        assert not (await engine.borrow_image(version.manifest_digest, "replica-0")).memories


@pytest.mark.parametrize(("asked", "set_to", "lent"), [(None, False, False), (True, False, True), (False, True, False)])
async def test_it_is_lent_where_that_is_asked_for(
    home: Path, config: Config, memory: Path, asked: bool | None, set_to: bool, lent: bool
) -> None:
    config = dataclasses.replace(config, use_ipc_agent=set_to)
    await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config, lend=asked)
    assert bool(held(memory)) == lent


async def test_the_version_before_is_freed_for_the_next_but_not_under_an_engine_that_reads_it(
    home: Path, config: Config, memory: Path
) -> None:
    versions: list[model_pb2.Version] = []
    async with an_engine(config) as engine:
        for name in ("v1", "v2"):
            versions.append(
                await publish_module_async(
                    state(len(versions)), model="m", version=name, folder=home / name, config=config
                )
            )
            assert len(held(memory)) == 1
        assert not (await engine.borrow_image(versions[0].manifest_digest, "replica-0")).memories
        assert (await engine.borrow_image(versions[1].manifest_digest, "replica-0")).memories
        await until(lambda: lending._loans["m"].borrowers == 1)
        third = await publish_module_async(state(3), model="m", version="v3", folder=home / "v3", config=config)
        assert not (await engine.borrow_image(third.manifest_digest, "replica-0")).memories
        assert (await engine.borrow_image(versions[1].manifest_digest, "replica-0")).memories


async def test_a_lease_that_is_over_frees_the_memory_whoever_reads_it(home: Path, config: Config, memory: Path) -> None:
    version = await publish_module_async(
        state(), model="m", version="v1", folder=home / "v1", config=config, lease_s=1.0
    )
    async with an_engine(config) as engine:
        assert (await engine.borrow_image(version.manifest_digest, "replica-0")).left_s <= 1.0
        await until(lambda: lending._loans["m"].is_over)
        assert not held(memory)
        assert not (await engine.borrow_image(version.manifest_digest, "replica-0")).memories


@pytest.mark.parametrize("borrowed", [True, False])
async def test_when_the_agent_ends_the_memory_stays_for_those_who_borrowed_it(
    home: Path, memory: Path, borrowed: bool
) -> None:
    coordinator = Coordinator(CoordinatorConfig(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:"))
    await coordinator.start()
    config = a_config(home, "a", str(coordinator.endpoint), HOTWEIGHTS_USE_IPC_AGENT="1")
    async with agent_of(config) as engine:
        version = await publish_module_async(
            state(), model="m", version="v1", folder=home / "v1", config=config, lease_s=4.0
        )
        loan = lending._loans["m"]
        if borrowed:
            await engine.borrow_image(version.manifest_digest, "replica-0")
            await until(lambda: loan.borrowers == 1)
    await asyncio.sleep(1.0)
    assert loan.is_over != borrowed
    assert bool(held(memory)) == borrowed
    assert await asyncio.to_thread(loan.wait, DEADLINE_S)
    assert not held(memory)
    await coordinator.stop()


async def test_an_engine_that_ended_borrows_no_longer(
    home: Path, config: Config, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotweights.worker_client.agent.lending.LOOK_S", 0.1)
    monkeypatch.setattr("hotweights.worker_client.stage.pins.GRACE_S", 0.0)
    version = await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config)
    digest = version.manifest_digest
    async with an_engine(config) as engine:
        await engine.stage(digest)
        await engine.map_image(digest, "replica-0")
        await engine.borrow_image(digest, "replica-0")
        await asyncio.sleep(1.0)
        assert held(memory)
    await until(lambda: not held(memory))


async def test_a_version_that_is_refused_is_not_lent_on(home: Path, config: Config, memory: Path) -> None:
    await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config, lend=False)
    with pytest.raises(Refused):
        await publish_module_async(state(2), model="m", version="v1", folder=home / "other", config=config)
    assert not held(memory)


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), float("inf"), 3601.0])
async def test_a_lease_that_is_none_is_refused_before_anything_is_written(
    home: Path, config: Config, lease_s: float
) -> None:
    with pytest.raises(ValueError, match="lease_s takes seconds, up to 3600"):
        await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config, lease_s=lease_s)
    assert not (home / "v1").exists()


async def test_when_torch_has_no_room_for_a_copy_the_version_is_published_all_the_same(
    home: Path, config: Config, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensor: OnGpu) -> OnGpu:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(OnGpu, "contiguous", full)
    monkeypatch.setattr(OnGpu, "is_contiguous", lambda tensor: False)
    version = await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config)
    assert version.sequence == 1
    assert not held(memory)
    assert "engines take the image from host memory: CUDA out of memory" in caplog.text


async def test_of_one_image_only_so_many_borrow(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotweights.worker_client.agent.lending.BORROWERS_MAX", 2)
    async with an_engine(config) as client:
        loan = client.lend_image(bytes(32), a_request().memories, 60.0)
        await anext(loan)
        for _ in range(2):
            for at in range(2):
                assert (await client.borrow_image(bytes(32), f"replica-{at}")).memories
        with pytest.raises(Refused, match="2 clients borrow it already"):
            await client.borrow_image(bytes(32), "replica-2")
        await loan.aclose()


async def test_without_room_on_the_gpu_the_version_is_published_all_the_same(
    home: Path, config: Config, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(ordinal: int, size: int) -> None:
        raise CudaError("taking memory", "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr("hotweights.publish.lending.cuda_ipc.Lent", full)
    version = await publish_module_async(state(), model="m", version="v1", folder=home / "v1", config=config)
    assert version.sequence == 1
    assert "engines take the image from host memory: taking memory: CUDA_ERROR_OUT_OF_MEMORY" in caplog.text


async def test_a_state_on_no_gpu_is_published_and_nothing_lent(home: Path, config: Config, memory: Path) -> None:
    await publish_module_async({"c": torch.ones(3)}, model="m", version="v1", folder=home / "v1", config=config)
    assert not held(memory)


def test_a_tensor_that_is_not_the_one_that_was_written_is_not_lent(home: Path, memory: Path) -> None:
    from hotweights.publish.module import write_module
    from hotweights.transports.errors import TransportError

    write_module({"a": torch.ones(4)}, home / "v1")
    with pytest.raises(TransportError, match="a has 8 bytes, 16 in the file"):
        DeviceCopy({"a": OnGpu(torch.ones(2))}, home / "v1" / "model.safetensors")
    assert not held(memory)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda r: r.memories[0].ClearField("handle"), "a handle has 64 bytes, not 0"),
        (lambda r: r.memories[0].ClearField("seal"), "a seal has 1 to 256 bytes, not 0"),
        (lambda r: r.memories[0].ClearField("device_uuid"), "UUID is missing"),
        (lambda r: r.memories[0].ranges.add(), "a range's file is missing"),
        (lambda r: r.ClearField("memories"), "1 to 64 memories, not 0"),
        (lambda r: r.memories[0].ranges.extend([pb.DeviceRange(file="f")] * 65537), "at most 65536 ranges"),
        (lambda r: setattr(r, "lease_s", float("nan")), "a lease takes up to 3600 s"),
        (lambda r: setattr(r, "lease_s", 0.0), "a lease takes up to 3600 s"),
        (lambda r: setattr(r, "manifest_digest", b"short"), "has 32 bytes, not 5"),
    ],
)
async def test_what_nobody_could_borrow_is_refused(
    config: Config, spoil: Callable[[pb.LendImageRequest], None], problem: str
) -> None:
    from hotweights.worker_client.agent.lending import Lending

    request = a_request()
    spoil(request)
    with pytest.raises(Refused, match=problem):
        await anext(Lending(lambda digest: []).lend(request))


async def test_one_image_is_lent_by_one_process_and_few_at_a_time(config: Config) -> None:

    async with an_engine(config) as client:
        lent = [client.lend_image(bytes([at]) * 32, a_request().memories, 60.0) for at in range(9)]
        for at in range(8):
            assert await anext(lent[at]) == 0
        with pytest.raises(Refused, match="lent by another process") as twice:
            await anext(client.lend_image(bytes(32), a_request().memories, 60.0))
        assert twice.value.reason == "LENT_ALREADY"
        with pytest.raises(Refused, match="8 images are lent on this node already"):
            await anext(lent[8])
        await lent[0].aclose()
        for _ in range(100):
            with contextlib.suppress(Refused):
                assert await anext(client.lend_image(bytes(32), a_request().memories, 60.0)) == 0
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("what nobody lends any more is still taken")


def a_request() -> pb.LendImageRequest:
    told = pb.DeviceMemory(device_uuid=DEVICE, handle=bytes(64), seal=b"seal")
    return pb.LendImageRequest(manifest_digest=bytes(32), memories=[told], lease_s=60.0)
