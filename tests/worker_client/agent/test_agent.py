"""Agents as engines, publishers and the coordinator meet them: real sockets, real TCP, real files."""

import asyncio
import errno
import importlib.util
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.certificates import Authority
from tests.worker_client.agent.nodes import SmallCoordinator, a_config, a_coordinator, agent_of, answering, until
from tests.worker_client.image.files import entry, write_raw
from tests.worker_client.stage.checkpoints import contents, make_folder, touch_bytes

from hotweights.transports import ucx_lane
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.v1 import agent_service_pb2_grpc as rpc
from hotweights.v1 import worker_service_pb2
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused, Unreachable
from hotweights.worker_client.agent import folders
from hotweights.worker_client.agent.locks import AgentRuns
from hotweights.worker_client.agent.process import serve_agent
from hotweights.worker_client.agent_client import AgentClient, connect_or_start
from hotweights.worker_client.image.delta import make_delta
from hotweights.worker_client.image.folder import INDEX
from hotweights.worker_client.image.manifest import Image, build_manifest
from hotweights.worker_client.stage.errors import StageTaken
from hotweights.worker_client.stage.partial import Partial, Progress
from hotweights.worker_client.stage.stage import Stage


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short: a socket's path has at most 99 bytes."""
    return tmp_path_factory.mktemp("n")


@pytest.fixture
async def coordinator() -> AsyncIterator[SmallCoordinator]:
    async with a_coordinator() as small:
        yield small


async def test_a_folder_is_identified_staged_and_mapped_without_any_coordinator(home: Path) -> None:
    folder = make_folder(home / "v1")
    config = a_config(home, "a")
    told: list[tuple[int, int]] = []
    async with agent_of(config) as agent:
        digest = await agent.identify_folder(folder, lambda done, total: told.append((done, total)))
        assert digest == build_manifest(folder, bucket_bytes=65536).digest
        await agent.stage(digest)
        staged = await agent.map_image(digest, "replica-0")
        assert contents(staged) == contents(folder)
        status = await agent.status()
        assert [list(image.client_ids) for image in status.images] == [["replica-0"]]
        assert status.node_id == "a"
        await agent.release_image(digest, "replica-0")
        assert [image.pinned for image in (await agent.status()).images] == [False]
        assert stat.S_IMODE(config.agent_socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(config.agent_socket.parent.stat().st_mode) == 0o700
    assert not config.agent_socket.exists()
    assert all(0 <= done <= total for done, total in told)


async def test_an_image_that_is_not_staged_cannot_be_mapped_and_one_unknown_cannot_be_staged(home: Path) -> None:
    async with agent_of(a_config(home, "a")) as agent:
        digest = await agent.identify_folder(make_folder(home / "v1"))
        with pytest.raises(Refused) as not_staged:
            await agent.map_image(digest, "replica-0")
        assert (not_staged.value.code, not_staged.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_STAGED")
        with pytest.raises(Refused) as unknown:
            await agent.stage(bytes(32))
        assert unknown.value.reason == "NO_SOURCE"


async def test_a_client_without_an_id_and_one_that_maps_nothing_are_told_so(home: Path) -> None:
    config = a_config(home, "a")
    async with agent_of(config) as agent:
        digest = await agent.identify_folder(make_folder(home / "v1"))
        await agent.stage(digest)
        with pytest.raises(Refused, match="client's id"):
            await agent.map_image(digest, "")
        await agent.release_image(digest, "stranger")  # nothing to do for this client
        channel = open_channel(Endpoint(path=str(config.agent_socket)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rpc.AgentServiceStub(channel).ReleaseImage(
                pb.ReleaseImageRequest(manifest_digest=digest, client_id="stranger"), timeout=5
            )
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        await channel.close()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("relative/path", "BAD_REQUEST"), ("/nowhere/at/all", "NO_SUCH_FOLDER"), ("EMPTY", "BAD_IMAGE")],
)
async def test_a_folder_that_is_none_is_refused_by_name(home: Path, folder: str, reason: str) -> None:
    (home / "EMPTY").mkdir()
    config = a_config(home, "a")
    async with agent_of(config):
        channel = open_channel(Endpoint(path=str(config.agent_socket)))
        call = rpc.AgentServiceStub(channel).IdentifyFolder(
            pb.IdentifyFolderRequest(folder=folder.replace("EMPTY", str(home / "EMPTY"))), timeout=5
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call:
                pass
        assert reason.encode() in dict(refused.value.trailing_metadata() or ())["grpc-status-details-bin"]
        await channel.close()


@pytest.mark.parametrize("draft", [False, True], ids=["target", "with its draft"])
async def test_a_published_version_is_fetched_by_another_node_and_both_hold_it(
    home: Path, coordinator: SmallCoordinator, draft: bool
) -> None:
    folder = make_folder(home / "v1")
    if draft:
        make_folder(folder / "draft", seed=2)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)) as reader,
    ):
        version = await source.publish_folder(folder, "m", "v1")
        await until(lambda: coordinator.holders(version.manifest_digest) == ["a"], "the publisher holds it")
        await coordinator.hears("a", "b")
        number = coordinator.stage("b", version.manifest_digest, "a")
        report = await coordinator.outcome("b", number)
        assert report.staged.manifest_digest == version.manifest_digest
        assert (report.number, report.epoch) == (number, 1)
        assert [answer.refusal for answer in coordinator.answers] == [""]
        await until(lambda: coordinator.holders(version.manifest_digest) == ["a", "b"], "both hold it")
        staged = await reader.map_image(version.manifest_digest, "replica-0")
        assert contents(staged) == contents(folder)
        shown = [(entry.model, entry.version, entry.folder) for entry in (await source.status()).folders]
        assert shown == [("m", "v1", str(folder))]


@pytest.mark.asyncio(loop_scope="session")  # that of the other tests of ucx, which has one for good
@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")
async def test_where_ucx_is_asked_for_buckets_go_over_it_and_the_node_says_so(home: Path) -> None:
    first, second = (make_folder(home / name, tensor_bytes=400_000) for name in ("v1", "v2"))
    touch_bytes(second / "model-1.safetensors", 1000)
    settings = {"HOTWEIGHTS_TRANSPORT": "ucx", "HOTWEIGHTS_UCX_TLS": "tcp,self", "HOTWEIGHTS_CONNECTIONS": "4"}
    async with (
        a_coordinator() as coordinator,
        agent_of(a_config(home, "a", coordinator.endpoint, **settings)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint, **settings)) as reader,
        agent_of(a_config(home, "c", coordinator.endpoint)) as without,
    ):
        versions = [await source.publish_folder(folder, "m", folder.name) for folder in (first, second)]
        await coordinator.hears("a", "b", "c")
        ways = {"b": "ucx", "c": "tcp (no device for RDMA)"}
        for version, folder in zip(versions, (first, second), strict=True):
            for node, agent in (("b", reader), ("c", without)):
                number = coordinator.stage(node, version.manifest_digest, "a")
                assert (await coordinator.outcome(node, number)).staged.manifest_digest == version.manifest_digest
                last = [report for report in coordinator.reports[node] if report.number == number][-2].stage_progress
                assert last.transport == ways[node]
                assert contents(await agent.map_image(version.manifest_digest, "replica-0")) == contents(folder)
            assert last.wire_bytes == (last.bytes_total if folder is first else 12)


async def test_what_lies_in_a_folder_that_nodes_share_is_read_there_and_the_node_says_so(home: Path) -> None:
    """c shares nothing; b's second version is not where a says any more: it was moved aside and put back as another."""
    folder, shared = home / "shared", {"HOTWEIGHTS_SHARED": f"/nowhere/at/all:{home / 'shared'}"}
    first, second = (make_folder(folder / name, tensor_bytes=400_000, seed=seed) for seed, name in enumerate("12"))
    async with (
        a_coordinator() as coordinator,
        agent_of(a_config(home, "a", coordinator.endpoint, **shared)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint, **shared)) as reader,
        agent_of(a_config(home, "c", coordinator.endpoint)) as without,
    ):
        versions = [await source.publish_folder(path, "m", path.name) for path in (first, second)]
        await coordinator.hears("a", "b", "c")

        async def way(node: str, at: int) -> str:
            number = coordinator.stage(node, versions[at].manifest_digest, "a")
            assert (await coordinator.outcome(node, number)).staged.manifest_digest
            return [report for report in coordinator.reports[node] if report.number == number][
                -2
            ].stage_progress.transport

        assert await way("b", 0) == "file"
        assert await way("c", 0) == "tcp (no device for RDMA)"
        for agent in (reader, without):
            assert contents(await agent.map_image(versions[0].manifest_digest, "replica-0")) == contents(first)
        was = contents(second)
        for file in second.iterdir():  # what a tells of them, its stamps, is of before
            os.utime(file, ns=(0, 1))
        number = coordinator.stage("b", versions[1].manifest_digest, "a")
        assert "changed since it was hashed" in (await coordinator.outcome("b", number)).stage_failed.reason
        assert contents(second) == was


@pytest.mark.parametrize(
    ("transport", "certified", "said"),
    [
        ("ucx", True, "sends buckets in plaintext"),
        ("ucx", False, r"needs ucxx.*install hotweights\[ucx\]"),
        ("mpi", True, "sends buckets in plaintext"),
        ("mpi", False, r"needs mpi4py.*install hotweights\[mpi\]"),
    ],
)
async def test_where_a_transport_cannot_be_the_agent_does_not_start_and_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, transport: str, certified: bool, said: str
) -> None:
    settings = Authority(home).issue("a").environment if certified else {}
    monkeypatch.setattr(ucx_lane, "_lane", None)
    monkeypatch.setattr(ucx_lane, "MODULES", ("no_such_module",))
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    config = a_config(home, "a", HOTWEIGHTS_TRANSPORT=transport, **settings)
    with pytest.raises(ValueError, match=said):
        await asyncio.wait_for(serve_agent(config, started_by_client=False, stop=asyncio.Event()), 20)


@pytest.mark.parametrize("scheme", ["ucx", "memory", "cuda_ipc"])
async def test_a_source_chooses_no_transport_by_what_it_calls_itself(
    home: Path, coordinator: SmallCoordinator, scheme: str
) -> None:
    """UCX would be plaintext for a node with a certificate, and is a risk for one that did not ask for it."""
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)),
    ):
        digest = (await source.publish_folder(make_folder(home / "v1"), "m", "v1")).manifest_digest
        await coordinator.hears("a", "b")
        coordinator.hellos["a"].data_endpoint = coordinator.hellos["a"].data_endpoint.replace("tcp", scheme)
        failed = (await coordinator.outcome("b", coordinator.stage("b", digest, "a"))).stage_failed
        assert f"serves over '{scheme}'; this node reads over tcp and tcps" in failed.reason


async def test_a_node_passes_on_what_it_has_while_the_rest_still_comes(
    home: Path, coordinator: SmallCoordinator
) -> None:
    """The last of three, which is ordered first, has nobody else to ask than the one before it."""
    folder = make_folder(home / "v1", tensor_bytes=400_000)
    slow = a_config(home, "a", coordinator.endpoint, HOTWEIGHTS_BANDWIDTH_MAX="1MB")
    async with (
        agent_of(slow) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)) as second,
        agent_of(a_config(home, "c", coordinator.endpoint)) as third,
    ):
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b", "c")
        last = coordinator.stage("c", digest, "b", staging="b")
        first = coordinator.stage("b", digest, "a")
        await until(lambda: coordinator.progress("c", last) > 0, "the last has some of it")
        assert digest not in coordinator.held["b"]
        reports = [await coordinator.outcome("b", first), await coordinator.outcome("c", last)]
        assert [report.staged.manifest_digest for report in reports] == [digest, digest]
        for reader in (second, third):
            assert contents(await reader.map_image(digest, "replica-0")) == contents(folder)


async def test_of_the_next_version_only_what_changed_crosses_the_wire_node_by_node(
    home: Path, coordinator: SmallCoordinator
) -> None:
    """Three nodes with the version before; the last has nobody else to ask than the second."""
    first, second = (make_folder(home / name, tensor_bytes=400_000) for name in ("v1", "v2"))
    for at in range(0, 350_000, 1000):
        touch_bytes(second / "model-1.safetensors", at + 1000)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)),
        agent_of(a_config(home, "c", coordinator.endpoint)) as reader,
    ):
        before = (await source.publish_folder(first, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b", "c")
        for node in ("b", "c"):
            await coordinator.outcome(node, coordinator.stage(node, before, "a"))
        digest = (await source.publish_folder(second, "m", "v2")).manifest_digest
        orders = {"c": coordinator.stage("c", digest, "b", staging="b"), "b": coordinator.stage("b", digest, "a")}
        for node, number in orders.items():
            assert (await coordinator.outcome(node, number)).staged.manifest_digest == digest
            last = [report for report in coordinator.reports[node] if report.number == number][-2].stage_progress
            assert last.bytes_done == last.bytes_total > 1_600_000
            assert 0 < last.wire_bytes < 4000, "a third of a percent of one of two files"
        assert contents(await reader.map_image(digest, "replica-0")) == contents(second)


async def test_a_publisher_whose_folder_of_the_version_before_is_gone_sends_plain_buckets(
    home: Path, coordinator: SmallCoordinator
) -> None:
    first, second = (make_folder(home / name) for name in ("v1", "v2"))
    touch_bytes(second / "model-1.safetensors", 1000)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)) as reader,
    ):
        before = (await source.publish_folder(first, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b")
        await coordinator.outcome("b", coordinator.stage("b", before, "a"))
        touch_bytes(first / "model-1.safetensors", 1000)  # as the new version has it: no delta of these would be right
        digest = (await source.publish_folder(second, "m", "v2")).manifest_digest
        number = coordinator.stage("b", digest, "a")
        assert (await coordinator.outcome("b", number)).staged.manifest_digest == digest
        assert contents(await reader.map_image(digest, "replica-0")) == contents(second)
        last = [report for report in coordinator.reports["b"] if report.number == number][-2].stage_progress
        assert last.wire_bytes == 65536, "the one bucket that changed"


async def test_a_node_whose_predecessor_dies_goes_on_with_the_one_before(
    home: Path, coordinator: SmallCoordinator
) -> None:
    folder = make_folder(home / "v1", tensor_bytes=400_000)
    slow = a_config(home, "a", coordinator.endpoint, HOTWEIGHTS_BANDWIDTH_MAX="1MB")
    async with agent_of(slow) as source, agent_of(a_config(home, "c", coordinator.endpoint)) as reader:
        async with agent_of(a_config(home, "b", coordinator.endpoint)) as dies:
            digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
            await coordinator.hears("a", "b", "c")
            coordinator.stage("b", digest, "a")
            last = coordinator.stage("c", digest, "b", "a", staging="b")
            await until(lambda: coordinator.progress("c", last) > 0, "it has some of it")
            assert not (await dies.status()).images
        report = await coordinator.outcome("c", last)
        assert report.staged.manifest_digest == digest
        assert contents(await reader.map_image(digest, "replica-0")) == contents(folder)


async def test_a_node_that_sends_wrong_bytes_is_left_and_named(
    home: Path, coordinator: SmallCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its staged image is altered where nobody looks again."""
    monkeypatch.setattr("hotweights.worker_client.stage.fetch.REST_S", 0.0)  # it is asked again before all has come
    folder = make_folder(home / "v1", tensor_bytes=400_000)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)) as liar,
        agent_of(a_config(home, "c", coordinator.endpoint)) as reader,
    ):
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b", "c")
        await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
        staged = await liar.map_image(digest, "replica-0")
        for offset in range(0, 400_000, 65_536):
            touch_bytes(staged / "model-0.safetensors", offset + 1000)
        number = coordinator.stage("c", digest, "b", "a")
        assert (await coordinator.outcome("c", number)).staged.manifest_digest == digest
        assert contents(await reader.map_image(digest, "replica-0")) == contents(folder)
        said = [report for report in coordinator.reports["c"] if report.number == number]
        left = [report.source_left for report in said if report.HasField("source_left")]
        assert [(one.source_node_id, one.lied, one.manifest_digest) for one in left] == [("b", True, digest)]
        assert {report.stage_progress.source_node_id for report in said} <= {"", "a", "b"}


async def test_a_token_of_another_reader_image_or_key_opens_nothing(home: Path, coordinator: SmallCoordinator) -> None:
    one, two = make_folder(home / "v1"), make_folder(home / "v2", seed=2)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)),
    ):
        first = (await source.publish_folder(one, "m", "v1")).manifest_digest
        second = (await source.publish_folder(two, "m", "v2")).manifest_digest
        await coordinator.hears("a", "b")
        coordinator.hellos["a"].token_key = bytes(32)
        failed = await coordinator.outcome("b", coordinator.stage("b", first, "a"))
        assert "token" in failed.stage_failed.reason
        assert coordinator.holders(first) == ["a"]
        assert coordinator.holders(second) == ["a"]


async def test_a_published_folder_that_changed_is_withdrawn_and_never_served(
    home: Path, coordinator: SmallCoordinator
) -> None:
    folder = make_folder(home / "v1")
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)) as reader,
    ):
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        await until(lambda: coordinator.holders(digest) == ["a"], "the publisher holds it")
        await coordinator.hears("b")
        touch_bytes(folder / "model-0.safetensors", 5000)
        remote = await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
        assert "changed since it was hashed" in remote.stage_failed.reason
        await until(lambda: coordinator.holders(digest) == [], "nobody holds it")
        with pytest.raises(Refused, match="no source"):
            await source.stage(digest)
        assert not (await reader.status()).images


async def test_staging_a_local_folder_that_changed_names_the_file(home: Path, coordinator: SmallCoordinator) -> None:
    folder = make_folder(home / "v1")
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as agent:
        digest = await agent.identify_folder(folder)
        await until(lambda: coordinator.holders(digest) == ["a"], "it holds the folder")
        path = folder / "model-0.safetensors"
        before = path.stat()
        touch_bytes(path, 5000)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the digest tells
        with pytest.raises(Refused) as refused:
            await agent.stage(digest)
        assert (refused.value.reason, refused.value.fields["file"]) == ("FOLDER_CHANGED", "model-0.safetensors")
        await until(lambda: coordinator.holders(digest) == [], "it holds it no longer")


async def test_the_same_version_with_other_bytes_is_refused_with_the_coordinators_reason(
    home: Path, coordinator: SmallCoordinator
) -> None:
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as agent:
        await agent.publish_folder(make_folder(home / "v1"), "m", "v1")
        with pytest.raises(Refused) as refused:
            await agent.publish_folder(make_folder(home / "other", seed=2), "m", "v1")
        assert refused.value.reason == "VERSION_EXISTS"


async def test_publishing_without_a_coordinator_says_what_to_set(home: Path) -> None:
    async with agent_of(a_config(home, "a")) as agent:
        with pytest.raises(Refused, match="HOTWEIGHTS_ENDPOINT"):
            await agent.publish_folder(make_folder(home / "v1"), "m", "v1")


async def test_an_order_that_cannot_be_done_in_time_or_in_room_fails_with_its_reason(
    home: Path, coordinator: SmallCoordinator
) -> None:
    folder = make_folder(home / "v1", tensor_bytes=1_000_000)
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint), quota_bytes=1_000_000),
    ):
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b")
        full = await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
        assert "1000000 bytes) free" in full.stage_failed.reason
        late = await coordinator.outcome("a", coordinator.stage("a", digest, "b", deadline_s=0.0001))
        assert "longer than allowed" in late.stage_failed.reason


async def test_pins_of_the_coordinator_are_kept_and_unknown_orders_are_refused(
    home: Path, coordinator: SmallCoordinator
) -> None:
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as agent:
        digests = []
        for number in range(3):
            digests.append(await agent.identify_folder(make_folder(home / f"v{number}", seed=number)))
        await coordinator.hears("a")
        await agent.stage(digests[0])
        await agent.stage(digests[1])
        coordinator.order("a", unpin=worker_service_pb2.UnpinImages(pinned_digests=[digests[0]]))
        await until(lambda: len(coordinator.answers) == 1, "the order is answered")
        await agent.stage(digests[2])
        images = {image.manifest_digest: image.pinned for image in (await agent.status()).images}
        assert images == {digests[0]: True, digests[2]: False}
        coordinator.order("a", apply=worker_service_pb2.ApplyImage())
        await until(lambda: len(coordinator.answers) == 2, "the order is answered")
        assert "does not know" in coordinator.answers[1].refusal


async def test_an_agent_that_restarts_serves_again_what_did_not_change(
    home: Path, coordinator: SmallCoordinator
) -> None:
    same, changed = make_folder(home / "v1"), make_folder(home / "v2", seed=2)
    config = a_config(home, "a", coordinator.endpoint)
    async with agent_of(config) as agent:
        first = (await agent.publish_folder(same, "m", "v1")).manifest_digest
        second = (await agent.publish_folder(changed, "m", "v2")).manifest_digest
        await agent.stage(second)
    await until(lambda: not coordinator.held, "it left")
    touch_bytes(changed / "model-1.safetensors", 5000)
    async with agent_of(config) as agent:
        await until(lambda: set(coordinator.holders(first) + coordinator.holders(second)) == {"a"}, "it holds both")
        status = await agent.status()
        assert [(folder.version, folder.manifest_digest) for folder in status.folders] == [("v1", first)]
        assert [image.manifest_digest for image in status.images] == [second], "its staged copy is as it was"
        await agent.map_image(second, "replica-0")


HOSTILE: dict[str, dict[str, object]] = {
    "a tensor's name that is no Unicode": {"a\ud800": entry("U8", [1], 0, 1)},
    "a shape beyond 64 bits": {"a": entry("U8", [1], 0, 1), "b": entry("U8", [0, 1 << 70], 1, 1)},
    "an index that names a file of no Unicode": {"weight_map": {"a": "\ud800.safetensors"}},
    "an index that names a tensor of no Unicode": {"weight_map": {"a\ud800": "model-0.safetensors"}},
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_served_folder_that_is_spoiled_with_what_no_manifest_holds_does_not_end_the_agent(
    home: Path, coordinator: SmallCoordinator, what: str
) -> None:
    folder = make_folder(home / "v1")
    config = a_config(home, "a", coordinator.endpoint)
    async with agent_of(config) as agent:
        await agent.publish_folder(folder, "m", "v1")
    if "weight_map" in HOSTILE[what]:
        (folder / INDEX).write_text(json.dumps(HOSTILE[what]))
    else:
        write_raw(folder / "model-0.safetensors", HOSTILE[what], b"x")
    async with agent_of(config) as agent:
        with pytest.raises(Refused) as refused:
            await agent.identify_folder(folder)
        assert refused.value.reason == "BAD_IMAGE"
        await until(lambda: "no longer served" in (config.stage_dir / "agent.log").read_text(), "it is told")
        assert list((await agent.status()).folders) == []


async def test_an_agent_that_restarts_stages_from_a_folder_it_is_still_hashing_again(
    home: Path, coordinator: SmallCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(home, "a", coordinator.endpoint)
    async with agent_of(config) as agent:
        published = [
            await agent.publish_folder(make_folder(home / name, seed=seed), "m", name)
            for seed, name in enumerate(("v1", "v2", "v3"), start=1)
        ]

    def slow(folder: Path, **more: Any) -> Image:
        time.sleep(0.3)
        return build_manifest(folder, **more)

    monkeypatch.setattr(folders, "build_manifest", slow)
    async with agent_of(config) as agent:
        await agent.stage(published[2].manifest_digest)


async def test_a_second_agent_is_refused_by_the_socket_and_by_the_stage(home: Path) -> None:
    config = a_config(home, "a")
    async with agent_of(config) as agent:
        with pytest.raises(AgentRuns):
            await serve_agent(config, started_by_client=False)
        elsewhere = a_config(home, "a", HOTWEIGHTS_AGENT_SOCKET=str(home / "other" / "s.sock"))
        with pytest.raises(StageTaken):
            await serve_agent(elsewhere, started_by_client=False)
        assert (await agent.status()).node_id == "a", "the first one is untouched"


async def test_a_stale_socket_is_replaced(home: Path) -> None:
    config = a_config(home, "a")
    config.stage_dir.mkdir(mode=0o700)
    config.agent_socket.write_text("left by something")
    async with agent_of(config) as agent:
        assert (await agent.status()).node_id == "a"


async def test_a_socket_path_that_no_kernel_takes_is_refused(home: Path) -> None:
    with pytest.raises(Refused, match="HOTWEIGHTS_AGENT_SOCKET"):
        await serve_agent(a_config(home, "a" * 120), started_by_client=False)


async def test_every_address_without_an_advertised_one_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="HOTWEIGHTS_ADVERTISE"):
        await serve_agent(a_config(home, "a", HOTWEIGHTS_LISTEN="0.0.0.0:0"), started_by_client=False)


async def test_an_agent_that_nobody_needs_ends_by_itself(home: Path) -> None:
    config = a_config(home, "a", HOTWEIGHTS_AGENT_IDLE_S="0.5")
    running = asyncio.ensure_future(serve_agent(config, started_by_client=True))
    await asyncio.wait_for(running, 10)
    assert not config.agent_socket.exists()


async def test_an_agent_whose_image_is_mapped_does_not_end(home: Path) -> None:
    config = a_config(home, "a", HOTWEIGHTS_AGENT_IDLE_S="0.3")
    stop = asyncio.Event()
    running = asyncio.ensure_future(serve_agent(config, started_by_client=True, stop=stop))
    await until(config.agent_socket.exists, "it runs")
    client = await connect_or_start(config)
    digest = await client.identify_folder(make_folder(home / "v1"))
    await client.stage(digest)
    await client.map_image(digest, "replica-0")
    assert client._keeper is not None
    client._keeper.cancel()
    await asyncio.sleep(1.5)
    assert not running.done(), "an engine maps an image of it"
    await client.release_image(digest, "replica-0")
    await asyncio.wait_for(running, 10)
    await client.close()


async def test_the_only_holder_of_a_version_stays_until_another_has_it(
    home: Path, coordinator: SmallCoordinator
) -> None:
    config = a_config(home, "a", coordinator.endpoint, HOTWEIGHTS_AGENT_IDLE_S="0.3")
    running = asyncio.ensure_future(serve_agent(config, started_by_client=True))
    await coordinator.hears("a")
    client = await connect_or_start(config)
    version = await client.publish_folder(make_folder(home / "v1"), "m", "v1")
    await client.close()
    await asyncio.sleep(1.5)
    assert not running.done(), "it has the only copy"
    coordinator.held["b"] = [version.manifest_digest]
    await asyncio.wait_for(running, 10)


async def test_an_agent_whose_folder_was_removed_ends_though_nobody_can_say_who_else_has_its_images(
    home: Path,
) -> None:
    async with a_coordinator() as coordinator:
        config = a_config(home, "a", coordinator.endpoint, HOTWEIGHTS_AGENT_IDLE_S="0.3")
        running = asyncio.ensure_future(serve_agent(config, started_by_client=True))
        await coordinator.hears("a")
        client = await connect_or_start(config)
        await client.publish_folder(make_folder(home / "v1"), "m", "v1")
        await client.close()
    await asyncio.sleep(1.5)
    assert not running.done(), "a coordinator that comes back may send others to it"
    shutil.rmtree(config.stage_dir)
    await asyncio.wait_for(running, 10)


async def test_an_agent_that_lost_its_folder_leaves_the_socket_of_the_one_that_came_after_it(home: Path) -> None:
    config = a_config(home, "a")
    async with agent_of(config) as first:
        await first.close()
        shutil.rmtree(config.stage_dir)
        stop = asyncio.Event()
        second = asyncio.ensure_future(serve_agent(config, started_by_client=False, stop=stop))
        client = AgentClient(config)
        await answering(client, second)
    try:
        assert (await client.status()).node_id == "a", "the first has ended by now"
        assert config.agent_socket.exists()
    finally:
        await client.close()
        stop.set()
        await asyncio.wait_for(second, 10)
    assert not config.agent_socket.exists()


async def test_a_client_of_another_coordinator_is_refused(home: Path) -> None:
    async with agent_of(a_config(home, "a", "tcp://127.0.0.1:1")):
        with pytest.raises(Refused) as refused:
            await connect_or_start(a_config(home, "a", "tcp://127.0.0.1:2"))
        assert refused.value.reason == "OTHER_COORDINATOR"
        assert refused.value.fields == {"agent": "tcp://127.0.0.1:1", "asked": "tcp://127.0.0.1:2"}


async def test_in_kubernetes_none_is_started_and_the_error_says_what_to_do(home: Path) -> None:
    config = a_config(home, "a", KUBERNETES_SERVICE_HOST="10.0.0.1")
    with pytest.raises(Refused, match="DaemonSet"):
        await connect_or_start(config)
    assert not config.stage_dir.exists()


async def test_an_agent_that_is_gone_is_unreachable(home: Path) -> None:
    config = a_config(home, "a")
    async with agent_of(config) as agent:
        await agent.status()
    with pytest.raises(Unreachable):
        await agent.__class__(config).probe()


@pytest.fixture
def deltas_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the deltas that agents make in this process."""
    made: list[int] = []

    def noted(target: memoryview, base: memoryview) -> bytes | None:
        delta = make_delta(target, base)
        made.append(-1 if delta is None else len(delta))
        return delta

    monkeypatch.setattr("hotweights.worker_client.agent.data.make_delta", noted)
    return made


def a_step(folder: Path, to: Path, *, places: list[int]) -> Path:
    """The folder with other bytes at some places of its first file."""
    shutil.copytree(folder, to)
    for place in places:
        touch_bytes(to / "model-0.safetensors", place)
    return to


async def test_deltas_to_the_version_before_are_made_while_a_version_is_published(
    home: Path, coordinator: SmallCoordinator, deltas_made: list[int]
) -> None:
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)),
    ):
        first = make_folder(home / "v1")
        one = await source.publish_folder(first, "m", "v1")
        await source.publish_folder(make_folder(home / "other", seed=5), "another", "v1")
        assert not deltas_made, "there is nothing before it"
        step = a_step(first, home / "v2", places=[1000, 150_000])
        two = await source.publish_folder(step, "m", "v2")
        await until(lambda: len(deltas_made) == 2, "a delta of each bucket that changed")
        assert all(0 < size < 100 for size in deltas_made)
        await coordinator.hears("a", "b")
        assert (await coordinator.outcome("b", coordinator.stage("b", one.manifest_digest, "a"))).staged
        staged = (await coordinator.outcome("b", coordinator.stage("b", two.manifest_digest, "a"))).staged
        assert staged.manifest_digest == two.manifest_digest
        assert len(deltas_made) == 2, "the reader was given what was there"


@pytest.fixture
def touched_early(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Buckets of images on their way that were touched in a map, or scanned, before their pages were there.

    Pages come slowly here.
    """
    real_view, real_scan, real_finish, real_fallocate = Partial.view, Partial.scan, Stage.finish, os.posix_fallocate
    early: list[int] = []

    def note(partial: Partial, *indices: int) -> None:
        early.extend(index for index in indices if not partial.has_room(index))

    def view(partial: Partial, index: int) -> memoryview:
        note(partial, index)
        return real_view(partial, index)

    def scan(partial: Partial, progress: Progress | None = None) -> None:
        note(partial, *range(len(partial.manifest.buckets)))
        real_scan(partial, progress)

    def finish(stage: Stage, partial: Partial) -> Path:
        note(partial, *range(len(partial.manifest.buckets)))
        return real_finish(stage, partial)

    def slow(handle: int, offset: int, size: int) -> None:
        time.sleep(0.02)
        real_fallocate(handle, offset, size)

    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(Partial, "view", view)
    monkeypatch.setattr(Partial, "scan", scan)
    monkeypatch.setattr(Stage, "finish", finish)
    monkeypatch.setattr(os, "posix_fallocate", slow)
    return early


async def test_no_byte_of_an_image_is_touched_before_its_pages_are_there_however_it_comes(
    home: Path, coordinator: SmallCoordinator, touched_early: list[int]
) -> None:
    """A sparse file on a full tmpfs kills whoever touches it."""
    config = a_config(home, "b", coordinator.endpoint)
    first = make_folder(home / "v1", tensor_bytes=2_000_000)
    second = a_step(first, home / "v2", places=[1000, 1_500_000])
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as source:
        one = (await source.publish_folder(first, "m", "v1")).manifest_digest
        two = (await source.publish_folder(second, "m", "v2")).manifest_digest
        async with agent_of(config) as reader:
            await coordinator.hears("a", "b")
            for digest, folder in ((one, first), (two, second)):  # all of it, then what changed
                await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
                assert contents(await reader.map_image(digest, "replica-0")) == contents(folder)
            third = make_folder(home / "v3", seed=3, tensor_bytes=2_000_000)
            three = (await reader.publish_folder(third, "m", "v3")).manifest_digest
            await reader.stage(three)  # from a folder of this node
        left = config.stage_dir / two.hex()
        left.rename(left.with_name(f"{two.hex()}.partial"))
        for file in left.with_name(f"{two.hex()}.partial").iterdir():
            file.chmod(0o600)
        async with agent_of(config) as reader:
            await coordinator.hears("b")
            await coordinator.outcome("b", coordinator.stage("b", two, "a"))  # what a former agent had begun
            assert contents(await reader.map_image(two, "replica-0")) == contents(second)
    assert not touched_early


async def test_where_memory_runs_out_while_an_image_comes_it_is_refused_freed_and_comes_another_time(
    home: Path, coordinator: SmallCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.posix_fallocate, 0

    def runs_out(handle: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            time.sleep(0.2)  # buckets come meanwhile
        if calls >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, offset, size)

    monkeypatch.setattr("hotweights.worker_client.stage.partial._PIECE_BYTES", 1 << 20)
    config = a_config(home, "b", coordinator.endpoint)
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as source, agent_of(config):
        version = await source.publish_folder(make_folder(home / "v1", tensor_bytes=4_000_000), "m", "v1")
        await coordinator.hears("a", "b")
        monkeypatch.setattr(os, "posix_fallocate", runs_out)
        failed = await coordinator.outcome("b", coordinator.stage("b", version.manifest_digest, "a"))
        assert "more for this image" in failed.stage_failed.reason
        assert not list(config.stage_dir.glob(f"{version.manifest_digest.hex()}*"))
        monkeypatch.setattr(os, "posix_fallocate", real)
        again = await coordinator.outcome("b", coordinator.stage("b", version.manifest_digest, "a"))
        assert again.staged.manifest_digest == version.manifest_digest


async def test_of_a_version_of_which_everything_changed_only_a_few_buckets_are_looked_at(
    home: Path, coordinator: SmallCoordinator, deltas_made: list[int]
) -> None:
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as source:
        for seed in (1, 2):
            folder = make_folder(home / f"v{seed}", seed=seed, tensor_bytes=1_000_000)
            await source.publish_folder(folder, "m", f"v{seed}")
        await until(lambda: len(deltas_made) >= 8, "some were tried")
        await asyncio.sleep(0.3)
        assert set(deltas_made) == {-1}
        assert len(deltas_made) < 16


async def test_an_agent_ends_while_it_makes_deltas(
    home: Path, coordinator: SmallCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(target: memoryview, base: memoryview) -> bytes:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.2)
        return b"d"

    monkeypatch.setattr("hotweights.worker_client.agent.data.make_delta", slow)
    async with agent_of(a_config(home, "a", coordinator.endpoint)) as source:
        first = make_folder(home / "v1", tensor_bytes=4_000_000)
        await source.publish_folder(first, "m", "v1")
        await source.publish_folder(a_step(first, home / "v2", places=list(range(1000, 8_000_000, 65536))), "m", "v2")
        await asyncio.wait_for(begun.wait(), 10)
        ends = loop.time()
    assert loop.time() - ends < 5
