"""The controller: orders in, reports out, images mapped and let go."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from tests.worker_client.window.benches import V1, V2, V3, Bench, running, until
from tests.worker_client.window.fakes import FakeAgent, FakeEngine, FakeStream, fails, hangs, refuses

from hotweights.v1 import update_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1.agent_service_pb2 import BorrowImageResponse, DeviceMemory
from hotweights.wire.errors import Refused
from hotweights.worker_client.window.controller import Identity, ReplicaController
from hotweights.worker_client.window.identify import Images


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running(Bench()) as bench:
        yield bench


async def test_until_it_knows_what_is_served_it_says_that_it_is_finding_out() -> None:
    stream, answer = FakeStream(), asyncio.Event()

    async def connect() -> Images:
        await answer.wait()
        agent = FakeAgent()
        agent.held = {V1}
        return agent

    controller = ReplicaController(Identity("r1", "n1"), FakeEngine(), connect, stream.open)
    running = asyncio.ensure_future(controller.run())
    await until(lambda: stream.hello is not None)
    assert stream.hello is not None
    assert stream.hello().replica.identifying
    answer.set()
    assert (await stream.take()).active_changed.active_digest == V1
    assert not stream.hello().replica.identifying
    controller.close()
    await asyncio.wait_for(running, 5)


async def test_at_start_it_says_what_the_engine_was_started_on(bench: Bench) -> None:
    assert bench.stream.hello is not None
    hello = bench.stream.hello().replica
    assert (hello.replica_id, hello.active_digest) == ("r1", V1)
    assert [(rank.index, rank.node_id, rank.pid) for rank in hello.ranks] == [(0, "n1", 100), (1, "n1", 101)]
    assert list(hello.fingerprints) == [b"0:/base", b"1:/base"]


async def test_prepare_then_apply_then_end(bench: Bench) -> None:
    prepared = (await bench.prepare(V2)).prepared
    assert (prepared.manifest_digest, prepared.base_digest) == (V2, V1)
    assert "pause" not in bench.engine.calls
    report = await bench.apply(V2)
    assert report.applied.active_digest == V2
    assert list(report.applied.fingerprints) == [b"0:/stage/v2", b"1:/stage/v2"]
    assert (report.number, report.update_id, report.epoch) == (2, "u1", 1)
    await bench.end()
    assert bench.controller is not None
    assert bench.controller.status()["active_version"] == "v2"
    assert bench.agent.mapped == [V2]


async def test_the_image_of_before_is_released_when_the_next_update_ends(bench: Bench) -> None:
    await bench.prepare(V2)
    await bench.apply(V2)
    await bench.end()
    bench.engine.calls.clear()
    await bench.prepare(V3)
    await bench.apply(V3)
    await bench.end()
    await until(lambda: bench.agent.mapped == [V3])


async def test_restore_after_an_apply_uses_the_kept_copies(bench: Bench) -> None:
    await bench.prepare(V2)
    await bench.apply(V2)
    bench.agent.held.clear()  # not even the agent is needed
    report = await bench.apply(V1, restore=True, version="v1")
    assert report.applied.active_digest == V1
    assert bench.engine.weights == ["/base", "/base"]
    assert bench.engine.tag == "v1"


async def test_going_back_after_the_engine_ran_clears_the_caches_and_an_undo_does_not(bench: Bench) -> None:
    await bench.prepare(V2)
    fails(bench.engine, "tag", "no tag")
    assert (await bench.apply(V2)).apply_failed.failure == pb.APPLY_FAILURE_UNDONE
    assert "undo" in bench.engine.calls
    assert not bench.engine.cleared_caches
    del bench.engine.does["tag"]
    await bench.apply(V2)
    await bench.apply(V1, restore=True, version="v1")
    assert bench.engine.cleared_caches


async def test_nothing_is_kept_in_flight_where_the_caches_are_cleared(bench: Bench) -> None:
    modes = []

    async def pause(mode: str) -> None:
        modes.append(mode)

    bench.engine.does["pause"] = pause
    for digest, spoilt, restore in ((V2, False, False), (V1, False, True), (V2, True, False)):
        bench.engine.caches_spoilt = spoilt
        if not restore:
            await bench.prepare(digest)
        report = await bench.apply(digest, inflight=update_pb2.INFLIGHT_KEEP, restore=restore)
        assert report.applied.active_digest == digest
    assert modes == ["keep", "recompute", "recompute"]


async def test_a_check_asked_for_is_made_unless_it_was_made_already(bench: Bench) -> None:
    for check_finite, prepared in ((False, 1), (True, 2), (True, 2), (False, 2)):
        assert (await bench.prepare(V2, check_finite=check_finite)).prepared.manifest_digest == V2
        assert bench.engine.calls.count("prepare") == prepared
    assert bench.engine.checks_finite
    assert (await bench.apply(V2)).applied.active_digest == V2
    assert bench.engine.calls.count("prepare") == 2


async def test_restore_without_copies_prepares_the_base_image(bench: Bench) -> None:
    await bench.prepare(V2)
    await bench.apply(V2)
    await bench.end()
    # The fake's proof is the folder's name: let the base image have the base's own.
    bench.agent.folders[V1] = Path("/base")
    report = await bench.apply(V1, restore=True)
    assert report.applied.active_digest == V1
    assert bench.engine.weights == ["/base", "/base"]


async def test_restore_of_what_is_served_already_succeeds_without_a_window(bench: Bench) -> None:
    await bench.prepare(V2)
    report = await bench.apply(V1, restore=True)
    assert report.applied.active_digest == V1
    assert "pause" not in bench.engine.calls


async def test_an_image_that_does_not_fit_is_refused_before_the_pause(bench: Bench) -> None:
    refuses(bench.engine, "prepared", "tensor a.weight has shape [1], not [2]")
    report = await bench.prepare(V2)
    assert "a.weight" in report.prepare_failed.reason
    assert "pause" not in bench.engine.calls
    assert bench.agent.mapped == []


async def test_an_image_that_is_altered_while_the_ranks_read_it_is_refused_and_let_go(bench: Bench) -> None:
    bench.agent.altered_once_mapped = {V2}
    failed = (await bench.prepare(V2)).prepare_failed
    assert "was altered" in failed.reason
    assert bench.agent.mapped == []
    assert bench.engine.prepared == ""


async def test_an_image_the_agent_has_not_is_refused(bench: Bench) -> None:
    report = await bench.prepare(b"unknown")
    assert "not staged" in report.prepare_failed.reason


async def test_a_failed_apply_is_reported_as_undone_and_can_be_tried_again(bench: Bench) -> None:
    await bench.prepare(V2)
    refuses(bench.engine, "apply", "broken")
    report = await bench.apply(V2)
    assert report.apply_failed.failure == pb.APPLY_FAILURE_UNDONE
    assert report.apply_failed.active_digest == V1
    assert "broken" in report.apply_failed.reason
    del bench.engine.does["apply"]
    assert (await bench.apply(V2)).applied.active_digest == V2


async def test_a_torn_replica_says_so_and_takes_no_order(bench: Bench) -> None:
    await bench.prepare(V2)
    hangs(bench.engine, "apply")
    report = await bench.apply(V2)
    assert report.apply_failed.failure == pb.APPLY_FAILURE_TORN
    assert bench.engine.killed
    refusal = await bench.stream.give(end=pb.EndUpdate())
    assert refusal.startswith("torn: ")


async def test_an_order_that_waited_too_long_is_expired(bench: Bench) -> None:
    await bench.prepare(V2)
    report = await bench.apply(V2, validity_s=0.0)
    assert report.apply_failed.failure == pb.APPLY_FAILURE_EXPIRED
    assert "pause" not in bench.engine.calls


async def test_the_same_order_again_gets_the_same_report(bench: Bench) -> None:
    order = pb.Order(number=7, epoch=1, update_id="u", prepare=pb.PrepareImage(manifest_digest=V2))
    assert bench.stream.on_order is not None
    on_order: Callable[[pb.Order], Awaitable[str]] = bench.stream.on_order
    assert await on_order(order) == ""
    first = await bench.stream.take()
    assert await on_order(order) == ""
    assert await bench.stream.take() == first
    assert bench.engine.calls.count("prepare") == 1


async def test_an_order_for_an_agent_is_refused(bench: Bench) -> None:
    assert "replica" in await bench.stream.give(stage=pb.StageImage(manifest_digest=V2))


async def test_the_ranks_prove_their_plans_with_the_image_that_is_served_and_let_go_of_it(bench: Bench) -> None:
    await bench.prepare(V2)
    assert bench.engine.base == "/stage/base"
    assert bench.agent.mapped == [V2]


async def test_an_image_that_is_served_but_not_here_leaves_the_plans_unproven(bench: Bench) -> None:
    bench.agent.held.discard(b"base")
    assert (await bench.prepare(V2)).WhichOneof("event") == "prepared"
    assert bench.engine.base == ""


@pytest.mark.parametrize("committed", [True, False])
async def test_what_would_install_something_else_than_was_committed_is_refused_before_the_pause(
    bench: Bench, committed: bool
) -> None:
    """What was taken back was perhaps written wrong here: it is no measure."""
    await bench.prepare(V2)
    await bench.apply(V2)
    if committed:
        await bench.end()
        await bench.prepare(V3)
        await bench.apply(V3)
    else:
        await bench.apply(V1, restore=True)
    await bench.end(committed=committed)
    bench.engine.expects = True
    bench.engine.expected = lambda rank: b"another"  # type: ignore[method-assign]
    await bench.prepare(V2)
    bench.engine.calls.clear()
    failed = (await bench.apply(V2)).apply_failed
    assert ("another fingerprint than the same version when" in failed.reason) == committed
    assert ("pause" in bench.engine.calls) != committed


async def test_the_routes_of_all_ranks_are_reported_together(bench: Bench) -> None:
    routes = (await bench.prepare(V2)).prepared.routes
    assert (routes.direct_modules, routes.direct_bytes) == (6, 60)
    assert (routes.reload_modules, routes.reload_bytes) == (1, 7)
    assert list(routes.reasons) == ["layer 0: for a reason", "all: packed", "layer 1: for a reason"]


def lends(bench: Bench) -> None:
    memory = DeviceMemory(device_uuid="GPU-0", handle=b"h" * 64, seal=b"s")
    memory.ranges.add(file="model.safetensors", file_offset=8, memory_offset=64, size_bytes=100)
    bench.agent.lent = BorrowImageResponse(memories=[memory], left_s=60.0)


@pytest.mark.parametrize("committed", [True, False])
async def test_what_is_lent_goes_to_the_ranks_and_back_once_they_let_go_of_it(bench: Bench, committed: bool) -> None:
    lends(bench)
    routes = (await bench.prepare(V2)).prepared.routes
    assert bench.engine.lent == {
        "left_s": 60.0,
        "memories": [
            {"device": "GPU-0", "handle": b"h" * 64, "seal": b"s", "ranges": [("model.safetensors", 8, 64, 100)]}
        ],
    }
    assert list(routes.sources) == ["cuda-ipc: of GPU-0", "all the same", "cuda-ipc: of GPU-1"]
    await bench.apply(V2)
    assert bench.agent.borrowed == [V2]
    if not committed:
        await bench.apply(V1, restore=True)
    await bench.end(committed=committed)
    assert bench.agent.borrowed == []


async def test_what_was_lent_for_an_image_that_another_takes_the_place_of_goes_back(bench: Bench) -> None:
    lends(bench)
    await bench.prepare(V2)
    await bench.prepare(V3)
    assert bench.agent.borrowed == [V3]


async def test_what_was_lent_for_an_image_that_the_ranks_refuse_goes_back(bench: Bench) -> None:
    lends(bench)
    refuses(bench.engine, "prepare", "no")
    assert (await bench.prepare(V2)).WhichOneof("event") == "prepare_failed"
    assert bench.agent.borrowed == []


@pytest.mark.parametrize("coming", [3, 10**9])
async def test_what_the_agent_is_uploading_is_waited_for_but_not_for_ever(
    bench: Bench, coming: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lends(bench)
    found, asked = bench.agent.borrow_image, []

    async def later(digest: bytes, client_id: str, *, upload: bool) -> BorrowImageResponse:
        asked.append(digest)
        is_coming = upload and len(asked) <= coming
        return BorrowImageResponse(coming=True) if is_coming else await found(digest, client_id, upload=upload)

    bench.agent.borrow_image = later  # type: ignore[method-assign]
    monkeypatch.setattr("hotweights.worker_client.window.prepare.UPLOAD_SHARE", 0.01)
    assert (await bench.prepare(V2)).WhichOneof("event") == "prepared"
    assert len(asked) > 3
    assert bool(bench.engine.lent)


async def test_an_agent_that_cannot_say_what_is_lent_is_no_obstacle(bench: Bench) -> None:
    async def unknown(digest: bytes, client_id: str, *, upload: bool) -> BorrowImageResponse:
        raise Refused(grpc.StatusCode.UNIMPLEMENTED, "", "an agent of a version before")

    bench.agent.borrow_image = unknown  # type: ignore[method-assign]
    assert (await bench.prepare(V2)).WhichOneof("event") == "prepared"
    assert bench.engine.lent == {}


async def test_after_a_commit_the_ranks_keep_the_way_back_ready(bench: Bench) -> None:
    await bench.prepare(V2)
    await bench.apply(V2)
    await bench.end(committed=True)
    assert bench.engine.retained == "/stage/base"


async def test_the_way_back_of_what_was_not_committed_goes(bench: Bench) -> None:
    await bench.prepare(V2)
    await bench.apply(V2)
    await bench.apply(V1, restore=True)
    await bench.end(committed=False)
    assert bench.engine.retained == ""
