"""CoordinatorService over a real port: publishing, updates, lists, watches, and the answers that are kept."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.coordinator.live import (
    Live,
    Wire,
    agent_hello,
    digest_of,
    manifest_of,
    pages_of,
    refused,
    replica_hello,
    running,
    soon,
    until_event,
)

from hotweights.coordinator.config import Config
from hotweights.coordinator.server import CannotBind, Coordinator
from hotweights.coordinator.service import coordinator as service_module
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import fleet_pb2, manifest_pb2, model_pb2, update_pb2
from hotweights.wire.channel import PAGE_BYTES_MAX, open_channel
from hotweights.wire.endpoint import parse_endpoint


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    async with running() as started:
        yield started


@pytest.fixture
async def fleet(live: Live) -> AsyncIterator[Live]:
    """v1 and v2 on node n1; replica r1 on it serves v1."""
    wires = [await Wire(live).hello(agent_hello("n1", "v1", "v2"))]
    await live.publish("v1")
    await live.publish("v2")
    wires.append(await Wire(live).hello(replica_hello("r1", "v1")))
    yield live
    for wire in wires:
        await wire.close()


def start(version: str = "v2", **more: Any) -> pb.StartUpdateRequest:
    return pb.StartUpdateRequest(model="m", version=version, **more)


# Publishing.


async def test_a_version_is_published_and_found_again(live: Live) -> None:
    response = await live.publish("v1")
    version = response.version
    assert (version.name, version.sequence, version.tensor_count, version.image_bytes) == ("v1", 1, 1, 1000)
    assert version.state == model_pb2.VERSION_STATE_DECLARED
    assert not response.existed
    found = await soon(live.service.GetVersion(pb.GetVersionRequest(model="m", version="v1")))
    assert found.version == version


async def test_the_same_name_and_digest_again_is_the_same_version(live: Live) -> None:
    first = await live.publish("v1")
    again = await live.publish("v1")
    assert again.existed
    assert again.version == first.version


async def test_another_digest_under_the_name_is_refused_with_both_digests(live: Live) -> None:
    await live.publish("v1")
    refusal = await refused(live.publish("v1", manifest_of("other")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VERSION_EXISTS")
    assert refusal.fields == {"existing_digest": digest_of("v1").hex(), "offered_digest": digest_of("other").hex()}
    assert digest_of("v1").hex() in refusal.message


async def test_a_version_becomes_available_and_unavailable_with_its_holders(live: Live) -> None:
    await live.publish("v1")
    agent = await Wire(live).hello(agent_hello("n1", "v1"))
    (version,) = (await live.status()).versions
    assert (version.state, list(version.holder_node_ids)) == (model_pb2.VERSION_STATE_AVAILABLE, ["n1"])
    await agent.close()
    await until_event(live, fleet_pb2.EVENT_KIND_NODE_DETACHED)
    (version,) = (await live.status()).versions
    assert (version.state, list(version.holder_node_ids)) == (model_pb2.VERSION_STATE_UNAVAILABLE, [])


def header(blob: bytes, **more: Any) -> pb.PublishVersionRequest:
    fields = {"model": "m", "version": "v1", "manifest_digest": blake3.blake3(blob).digest(), **more}
    return pb.PublishVersionRequest(header=pb.PublishHeader(**fields))


BLOB = manifest_of("v1")
(PAGE,) = pages_of(BLOB)
EMPTY = manifest_pb2.Manifest(format="safetensors").SerializeToString()


def page(**more: Any) -> pb.PublishVersionRequest:
    fields = {"index": 0, "count": 1, "data": BLOB, **more}
    return pb.PublishVersionRequest(page=manifest_pb2.ManifestPage(**fields))


BAD_PUBLICATIONS: dict[str, tuple[list[pb.PublishVersionRequest], str]] = {
    "nothing": ([], "one header comes first"),
    "no pages": ([header(BLOB)], "names no tensors|digest in the header|0 of"),
    "no header": ([page()], "one header comes first"),
    "two headers": ([header(BLOB), header(BLOB), page()], "one header comes first"),
    "a page out of order": ([header(BLOB), page(index=1, count=2), page(index=0, count=2)], "pages in order"),
    "a page twice": ([header(BLOB), page(), page()], "pages in order"),
    "more pages than said": ([header(BLOB), page(), page(index=1)], "page 1 says there are 1 pages"),
    "another count": ([header(BLOB), page(count=2), page(index=1, count=3)], "page 1 says there are 3 pages"),
    "no count": ([header(BLOB), page(count=0)], "page 0 says there are 0 pages"),
    "more pages than any": ([header(BLOB), page(count=257)], "page 0 says there are 257 pages"),
    "an empty page": ([header(BLOB), page(count=2), page(index=1, count=2, data=b"")], "page 1 has 0 bytes"),
    "a large page": ([header(BLOB), page(data=bytes(PAGE_BYTES_MAX + 1))], "page 0 has 1048577 bytes"),
    "a page missing": ([header(BLOB), page(count=2)], "1 of 2 manifest pages"),
    "a wrong digest": ([header(b"other"), page()], "do not have the digest in the header"),
    "no tensors": ([header(EMPTY), page(data=EMPTY)], "names no tensors"),
    "no manifest": ([header(b"\xff\xff"), page(data=b"\xff\xff")], "cannot be read"),
    "no name": ([header(BLOB, version=""), page()], "use letters, digits"),
}


@pytest.mark.parametrize("what", BAD_PUBLICATIONS)
async def test_a_bad_publication_is_refused_and_leaves_nothing(live: Live, what: str) -> None:
    messages, text = BAD_PUBLICATIONS[what]

    async def stream() -> AsyncIterator[pb.PublishVersionRequest]:
        for message in messages:
            yield message

    refusal = await refused(live.service.PublishVersion(stream()))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert any(word in refusal.message for word in text.split("|"))
    assert not live.state.versions
    assert not live.state.models


async def test_an_image_that_is_said_to_be_larger_than_any_number_is_refused_and_the_leader_lives(live: Live) -> None:
    manifest = manifest_pb2.Manifest.FromString(BLOB)
    manifest.files[0].size_bytes = (1 << 64) - 1
    manifest.files.add(name="more.safetensors", size_bytes=(1 << 64) - 1, weights=True)
    refusal = await refused(live.publish("v1", manifest.SerializeToString()))
    assert "said to have 36893488147419103230 bytes" in refusal.message
    assert (await live.publish("v1")).version.image_bytes == 1000


async def test_a_watch_from_a_revision_beyond_all_waits(tmp_path: Path) -> None:
    async with running(f"sqlite:{tmp_path / 's.db'}") as live:  # which counts in signed 64 bits
        call = live.service.WatchEvents(pb.WatchEventsRequest(from_revision=(1 << 64) - 1))
        await soon(call.initial_metadata())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call.read(), 0.5)


async def test_a_manifest_that_is_too_large_is_refused(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MANIFEST_BYTES_MAX", 3 * PAGE_BYTES_MAX)
    blob = manifest_of("large", tensors=60_000)
    assert len(blob) > 3 * PAGE_BYTES_MAX
    refusal = await refused(live.publish("large", blob))
    assert f"larger than {3 * PAGE_BYTES_MAX} bytes" in refusal.message


async def test_a_page_that_never_comes_is_not_waited_for(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PAGE_DEADLINE_S", 0.1)

    async def stream() -> AsyncIterator[pb.PublishVersionRequest]:
        yield header(BLOB)
        await asyncio.sleep(60)

    refusal = await refused(live.service.PublishVersion(stream()))
    assert "did not come in time" in refusal.message


async def test_a_publication_as_a_whole_has_a_deadline(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PUBLICATION_DEADLINE_S", 0.5)

    async def slowly() -> AsyncIterator[pb.PublishVersionRequest]:
        yield header(BLOB)
        for index in range(200):
            await asyncio.sleep(0.1)
            yield page(index=index, count=200)

    refusal = await refused(live.service.PublishVersion(slowly()))
    assert "did not come in time" in refusal.message


async def test_a_manifest_comes_back_page_by_page_as_it_was_published(live: Live) -> None:
    blob = manifest_of("large", tensors=40_000)
    response = await live.publish("large", blob)
    request = pb.GetManifestRequest(manifest_digest=response.version.manifest_digest)
    pages = [message.page async for message in live.service.GetManifest(request)]
    assert len(pages) > 2
    assert [page.index for page in pages] == list(range(len(pages)))
    assert {page.count for page in pages} == {len(pages)}
    assert max(len(page.data) for page in pages) <= PAGE_BYTES_MAX
    assert b"".join(page.data for page in pages) == blob


async def test_an_unknown_manifest_is_refused(live: Live) -> None:
    call = live.service.GetManifest(pb.GetManifestRequest(manifest_digest=b"\0" * 32))
    assert (await refused(call.read())).reason == "MANIFEST_UNKNOWN"


async def test_a_deleted_version_takes_its_manifest_with_it_unless_another_needs_it(live: Live) -> None:
    await live.publish("v1")
    await live.publish("copy", manifest_of("v1"))
    for name, left in (("v1", True), ("copy", False)):
        await soon(live.service.DeleteVersion(pb.DeleteVersionRequest(model="m", version=name)))
        assert (await live.coordinator.runtime.manifest(digest_of("v1").hex()) is not None) is left


# Updates.


async def test_an_update_is_started_shown_and_cancelled(fleet: Live) -> None:
    response = await soon(fleet.service.StartUpdate(start(options=update_pb2.UpdateOptions(canary=1))))
    update = response.update
    assert (update.base_version, update.target_version) == ("v1", "v2")
    assert [row.replica_id for row in update.replicas] == ["r1"]
    assert update.phase == update_pb2.UPDATE_PHASE_STAGING
    found = await soon(fleet.service.GetUpdate(pb.GetUpdateRequest(id=update.id)))
    assert found.update.id == update.id
    status = await fleet.status()
    assert status.models[0].open_update_id == update.id
    cancelled = await soon(fleet.service.CancelUpdate(pb.CancelUpdateRequest(id=update.id)))
    assert cancelled.update.phase == update_pb2.UPDATE_PHASE_ABORTED
    assert cancelled.update.reason == "cancelled"
    listed = await soon(fleet.service.ListUpdates(pb.ListUpdatesRequest(model="m")))
    assert [update.id for update in listed.updates] == ["m.1"]


async def test_a_second_update_is_refused_and_names_the_first(fleet: Live) -> None:
    first = await soon(fleet.service.StartUpdate(start()))
    refusal = await refused(fleet.service.StartUpdate(start("v1")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UPDATE_OPEN")
    assert refusal.fields["update"] == first.update.id


async def test_a_plan_changes_nothing_and_is_refused_for_the_reasons_a_start_is(fleet: Live) -> None:
    before = fleet.state
    plan = (await soon(fleet.service.PlanUpdate(pb.PlanUpdateRequest(model="m", version="v2")))).plan
    assert [list(wave.replica_ids) for wave in plan.waves] == [["r1"]]
    assert [(node.node_id, node.fetch_bytes) for node in plan.nodes] == [("n1", 0)]
    assert fleet.state.updates == before.updates
    refusal = await refused(fleet.service.PlanUpdate(pb.PlanUpdateRequest(model="m", version="v9")))
    assert refusal.reason == "VERSION_UNKNOWN"


@pytest.mark.parametrize(("changed", "unchanged_bytes"), [((), 1000), ((0,), 600), ((0, 1), 0)])
async def test_a_plan_says_what_a_node_that_has_the_base_need_not_fetch(
    fleet: Live, changed: tuple[int, ...], unchanged_bytes: int
) -> None:
    def blob(name: str, digests: Sequence[bytes]) -> bytes:
        manifest = manifest_pb2.Manifest.FromString(manifest_of(name))
        del manifest.buckets[:]
        for at, (offset, size) in enumerate(((0, 400), (400, 600))):
            manifest.buckets.add(offset=offset, size_bytes=size, digest=digests[at])
        return bytes(manifest.SerializeToString(deterministic=True))

    old, new = [bytes([7]) * 32] * 2, [bytes([7]) * 32] * 2
    for at in changed:
        new[at] = bytes([8]) * 32
    await fleet.publish("base", blob("base", old))
    await fleet.publish("next", blob("next", new))
    held = {name: frozenset({fleet.state.versions["m", name].digest}) for name in ("base", "next")}
    node = replace(fleet.state.nodes["n1"], held=held["base"])
    source = replace(node, id="n2", held=held["next"])
    fleet.coordinator.runtime.state = replace(
        fleet.state,
        nodes={**fleet.state.nodes, "n1": node, "n2": source},
        models={**fleet.state.models, "m": replace(fleet.state.models["m"], committed="base")},
    )
    plan = (await soon(fleet.service.PlanUpdate(pb.PlanUpdateRequest(model="m", version="next")))).plan
    assert plan.base_version == "base"
    assert [(row.fetch_bytes, row.unchanged_bytes) for row in plan.nodes] == [(1000, unchanged_bytes)]


@pytest.mark.parametrize(
    ("method", "request_message", "reason"),
    [
        ("StartUpdate", start("v9"), "VERSION_UNKNOWN"),
        ("StartUpdate", pb.StartUpdateRequest(model="zoo"), "MODEL_UNKNOWN"),
        ("StartUpdate", start(options=update_pb2.UpdateOptions(max_unavailable="x")), "BAD_SHARE"),
        ("RollBack", pb.RollBackRequest(model="m"), "NO_WAY_BACK"),
        ("RollBack", pb.RollBackRequest(model="zoo"), "MODEL_UNKNOWN"),
        ("GetUpdate", pb.GetUpdateRequest(id="m.9"), "UPDATE_UNKNOWN"),
        ("CancelUpdate", pb.CancelUpdateRequest(id="m.9"), "UPDATE_UNKNOWN"),
        ("GetVersion", pb.GetVersionRequest(model="m", version="v9"), "VERSION_UNKNOWN"),
        ("DeleteVersion", pb.DeleteVersionRequest(model="m", version="v1"), "VERSION_PINNED"),
        ("SetModelPolicy", pb.SetModelPolicyRequest(model="m"), "POLICY_MISSING"),
        ("SetModelPolicy", pb.SetModelPolicyRequest(model="m", policy=77), "UNKNOWN_VALUE"),  # type: ignore[arg-type]
        ("ResumeModel", pb.ResumeModelRequest(model="zoo"), "MODEL_UNKNOWN"),
        ("UndrainReplica", pb.UndrainReplicaRequest(replica_id="r9"), "REPLICA_UNKNOWN"),
        ("GetStatus", pb.GetStatusRequest(model="zoo"), "MODEL_UNKNOWN"),
        ("ListVersions", pb.ListVersionsRequest(page_token="x"), "BAD_PAGE_TOKEN"),
        ("ListVersions", pb.ListVersionsRequest(page_token="9" * 5000), "BAD_PAGE_TOKEN"),
    ],
)
async def test_what_cannot_be_is_refused_with_its_reason(
    fleet: Live, method: str, request_message: Any, reason: str
) -> None:
    assert (await refused(getattr(fleet.service, method)(request_message))).reason == reason


async def test_policies_are_set_and_models_resumed(fleet: Live) -> None:
    request = pb.SetModelPolicyRequest(model="m", policy=model_pb2.MODEL_POLICY_AUTO)
    response = await soon(fleet.service.SetModelPolicy(request))
    assert response.model.policy == model_pb2.MODEL_POLICY_AUTO
    # `auto` starts at once what is newest and not tried.
    assert response.model.open_update_id == "m.1"
    assert not (await soon(fleet.service.ResumeModel(pb.ResumeModelRequest(model="m")))).model.held


async def test_lists_come_in_pages(live: Live) -> None:
    for i in range(5):
        await live.publish(f"v{i}")
    names, token = [], ""
    for _ in range(3):
        request = pb.ListVersionsRequest(model="m", page_size=2, page_token=token)
        response = await soon(live.service.ListVersions(request))
        names.append([version.name for version in response.versions])
        token = response.next_page_token
    assert (names, token) == ([["v4", "v3"], ["v2", "v1"], ["v0"]], "")


async def test_pages_and_watches_are_cut_by_bytes_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        await live.publish(f"v{i}")
    monkeypatch.setattr(service_module, "LIST_BYTES_MAX", 2)
    names, token = [], ""
    for _ in range(3):
        response = await soon(live.service.ListVersions(pb.ListVersionsRequest(page_token=token)))
        names.append([version.name for version in response.versions])
        token = response.next_page_token
    assert (names, token) == ([["v2"], ["v1"], ["v0"]], "")
    call = live.service.WatchEvents(pb.WatchEventsRequest(from_revision=1))
    heard = [[event.version for event in (await soon(call.read())).events] for _ in range(3)]
    assert heard == [["v0"], ["v1"], ["v2"]]
    call.cancel()


async def test_a_status_that_is_too_large_says_what_to_ask_for(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    await live.publish("v1")
    monkeypatch.setattr(service_module, "MESSAGE_BYTES_MAX", 100)
    refusal = await refused(live.service.GetStatus(pb.GetStatusRequest()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STATUS_TOO_LARGE")
    assert "ListNodes" in refusal.message


async def test_replicas_and_nodes_are_listed(fleet: Live) -> None:
    (replica,) = (await soon(fleet.service.ListReplicas(pb.ListReplicasRequest(model="m")))).replicas
    assert (replica.id, replica.active_version, replica.connected) == ("r1", "v1", True)
    (node,) = (await soon(fleet.service.ListNodes(pb.ListNodesRequest()))).nodes
    assert (node.id, node.connected, len(node.held_digests)) == ("n1", True, 2)


# Answers that are kept.


async def test_a_request_id_gets_the_first_answer_again(fleet: Live) -> None:
    first = await soon(fleet.service.StartUpdate(start(request_id="a")))
    await soon(fleet.service.CancelUpdate(pb.CancelUpdateRequest(id=first.update.id)))
    assert await soon(fleet.service.StartUpdate(start(request_id="a"))) == first
    # Another payload or another id is another request.
    assert (await soon(fleet.service.StartUpdate(start(request_id="b")))).update.id == "m.2"


async def test_a_request_id_gets_the_first_answer_after_a_restart_too(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 's.db'}"
    async with running(store) as live:
        first = await live.publish("v1", request_id="a")
        await live.publish("v2")
        cluster = (await live.status()).cluster_id
    async with running(store) as live:
        again = await live.publish("v1", request_id="a")
        assert again == first
        assert not again.existed
        status = await live.status()
        assert (status.cluster_id, status.epoch) == (cluster, 2)
        assert [version.name for version in status.versions] == ["v2", "v1"]


# Watching.


async def watched(live: Live, count: int, **request: Any) -> list[fleet_pb2.Event]:
    """The first so many events of a watch."""
    events: list[fleet_pb2.Event] = []
    call = live.service.WatchEvents(pb.WatchEventsRequest(**request))
    while len(events) < count:
        message = await soon(call.read())
        assert message is not grpc.aio.EOF
        events += message.events
    call.cancel()
    return events


async def test_a_watch_resumes_from_a_revision_without_gaps(live: Live) -> None:
    for i in range(4):
        await live.publish(f"v{i}")
    first = await watched(live, 2, from_revision=1)
    rest = await watched(live, 2, from_revision=first[1].revision + 1)
    assert [event.revision for event in (*first[:2], *rest)] == [1, 2, 3, 4]
    assert rest[0].kind == fleet_pb2.EVENT_KIND_VERSION_PUBLISHED


async def test_a_watch_goes_on_as_the_log_grows(live: Live) -> None:
    await live.publish("v0")
    watching = asyncio.create_task(watched(live, 3, from_revision=1))
    await asyncio.sleep(0.05)
    assert not watching.done()
    await live.publish("v1")
    await live.publish("v2")
    assert [event.version for event in await soon(watching)] == ["v0", "v1", "v2"]


async def test_a_watch_from_now_shows_only_what_is_new(live: Live) -> None:
    await live.publish("v0")
    call = live.service.WatchEvents(pb.WatchEventsRequest())
    await soon(call.initial_metadata())
    await live.publish("v1")
    assert [event.version for event in (await soon(call.read())).events] == ["v1"]
    call.cancel()


async def test_a_watch_of_one_model_shows_no_other(live: Live) -> None:
    await live.publish("x", model="other")
    await live.publish("v1")
    assert [event.version for event in await watched(live, 1, from_revision=1, model="m")] == ["v1"]


async def test_a_compacted_revision_is_an_explicit_error_that_names_the_first() -> None:
    async with running(keep_events=3) as live:
        for i in range(6):
            await live.publish(f"v{i}")
        refusal = await refused(watched(live, 1, from_revision=1))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_COMPACTED")
        first = int(refusal.fields["first_revision"])
        assert (await watched(live, 1, from_revision=first))[0].revision == first == 4


# What others' tools see.


async def test_health_says_serving_for_each_service_and_watches_see_it_end() -> None:
    async with running(stop_grace_s=5.0) as live:
        stub: Any = health_pb2_grpc.HealthStub(live.channel)
        for name in ("", "hotweights.v1.CoordinatorService", "hotweights.v1.WorkerService"):
            answer = await soon(stub.Check(health_pb2.HealthCheckRequest(service=name)))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await soon(watch.read())).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(live.coordinator.stop())
        assert (await soon(watch.read())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await soon(stopping)


async def test_reflection_lists_the_services(live: Live) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(live.channel)  # type: ignore[arg-type]

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    answer = await soon(stub.ServerReflectionInfo(ask()).read())
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "hotweights.v1.CoordinatorService",
        "hotweights.v1.WorkerService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_two_coordinators_do_not_share_a_port(live: Live) -> None:
    second = Coordinator(Config(endpoint=live.endpoint, store="memory:"))
    with pytest.raises(CannotBind, match="taken"):
        await second.start()


async def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    coordinator = Coordinator(Config(endpoint=parse_endpoint(f"unix:{tmp_path / 's'}"), store="memory:"))
    await coordinator.start()
    async with open_channel(coordinator.endpoint) as channel:
        status = await soon(rpc.CoordinatorServiceStub(channel).GetStatus(pb.GetStatusRequest()))
        assert status.epoch == 1
    await coordinator.stop()
