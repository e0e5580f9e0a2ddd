"""WorkerService over a real port: who is let in, what is said to them, and how sessions end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.coordinator.live import (
    Live,
    Wire,
    agent_hello,
    digest_of,
    fails,
    refused,
    replica_hello,
    running,
    soon,
    until_event,
)

from hotweights.coordinator.hub import ORDERS_MAX
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Ticket
from hotweights.coordinator.service import worker as worker_module
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import fleet_pb2, update_pb2
from hotweights.v1 import worker_service_pb2 as wire_pb
from hotweights.wire.errors import Refused, Unreachable
from hotweights.wire.tokens import check_token


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    async with running() as started:
        yield started


async def test_a_welcome_says_all_that_a_member_needs_to_know(live: Live) -> None:
    await live.publish("v1")
    wire = await Wire(live).hello(replica_hello(model=""))
    status = await live.status()
    assert wire.welcome is not None
    assert (wire.welcome.cluster_id, wire.welcome.epoch) == (status.cluster_id, 1)
    assert wire.welcome.model == "m"
    assert 0 < wire.welcome.heartbeat_s * 2 <= wire.welcome.lease_s
    assert wire.welcome.session_id
    await wire.close()


NODE = wire_pb.AgentHello(node_id="n")
BAD_HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "a heartbeat first": ({"heartbeat": wire_pb.Heartbeat()}, "first message of a session is a Hello"),
    "nobody": ({"hello": wire_pb.Hello(incarnation="i")}, "says its incarnation and the id"),
    "no incarnation": ({"hello": agent_hello(life="")}, "says its incarnation and the id"),
    "no ranks": ({"hello": replica_hello(ranks=[])}, "lists every rank"),
    "a short digest": ({"hello": replica_hello(active_digest=b"short")}, "a digest has 32 bytes, this one 5"),
    "a short token key": ({"hello": agent_hello(token_key=b"short")}, "a token key has 32 bytes, this one 5"),
    "an odd name": ({"hello": replica_hello("a b")}, "use letters, digits"),
    "an odd model": ({"hello": replica_hello(model="\x1b[31m")}, "use letters, digits"),
    "a long incarnation": ({"hello": agent_hello(life="i" * 201)}, "an incarnation has 201 characters"),
    "a long cluster": ({"hello": wire_pb.Hello(incarnation="i", cluster_id="c" * 201, agent=NODE)}, "201 characters"),
    "a long window": ({"hello": replica_hello(open_window="w" * 201)}, "an open window has 201 characters"),
    "a long endpoint": ({"hello": agent_hello(data_endpoint="tcp://" + "h" * 300 + ":1")}, "has 308 characters"),
    "an endpoint without a port": ({"hello": agent_hello(data_endpoint="tcp://host")}, "TRANSPORT://HOST:PORT, not"),
    "a path": ({"hello": agent_hello(data_endpoint="unix:/run/x")}, "TRANSPORT://HOST:PORT, not"),
    "an odd transport": ({"hello": agent_hello(data_endpoint="t\x1b://h:1")}, "TRANSPORT://HOST:PORT, not"),
    "many ranks": ({"hello": replica_hello(ranks=1025 * [fleet_pb2.Rank(node_id="n")])}, "1 to 1024, not 1025"),
    "many images": ({"hello": agent_hello("n", *(10_001 * ["v"]))}, "10001 images at one node"),
    "many fingerprints": ({"hello": replica_hello(fingerprints=1025 * [b"f"])}, "1025 fingerprints of 1025 bytes"),
    "a long fingerprint": ({"hello": replica_hello(fingerprints=[b"f" * 65])}, "1 fingerprints of 65 bytes"),
    "a long kind": ({"hello": replica_hello(fingerprint_kind="k" * 129)}, "a fingerprint kind has 129 characters"),
    "no such policy": ({"hello": replica_hello(policy=99)}, "99 is no ModelPolicy"),
}


@pytest.mark.parametrize("what", BAD_HELLOS)
async def test_a_bad_hello_is_refused_and_leaves_nothing(live: Live, what: str) -> None:
    message, text = BAD_HELLOS[what]
    wire = Wire(live)
    await wire.say(**message)
    refusal = await refused(wire.read())
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in refusal.message
    assert not live.state.seats
    assert not live.state.nodes
    assert not live.state.models


@pytest.mark.parametrize("endpoint", ["", "10.0.0.1:7", "tcps://node-1.agents.svc:7", "tcp://[fe80::1%eth0]:7"])
async def test_every_kind_of_data_endpoint_is_let_in_as_it_is(live: Live, endpoint: str) -> None:
    wire = await Wire(live).hello(agent_hello(data_endpoint=endpoint))
    assert live.state.nodes["n1"].endpoint == endpoint
    await wire.close()


async def test_what_one_member_says_at_length_hides_the_fleet_from_nobody(live: Live) -> None:
    endless = "x" * 3_000_000
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1", engine=endless))
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    stage = await agent.order("stage")
    failed = wire_pb.StageFailed(manifest_digest=stage.stage.manifest_digest, reason=endless)
    await agent.report(stage, stage_failed=failed)
    event = await until_event(live, fleet_pb2.EVENT_KIND_UPDATE_ENDED)
    await replica.say(report=wire_pb.Report(active_changed=wire_pb.ActiveChanged(note=endless)))
    for _ in range(100):
        if (shown := (await live.status()).replicas[0]).note:
            break
        await asyncio.sleep(0.05)
    assert (shown.engine[195:], shown.note[1995:]) == (
        "xxxxx... (2999800 more characters)",
        "xxxxx... (2998000 more characters)",
    )
    update = (await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))).update
    for reason in (update.reason, update.replicas[0].reason, event.message):
        assert reason.endswith("x... (2998000 more characters)")
        assert len(reason) < 2200
    for wire in (agent, replica):
        await wire.close()


async def test_a_stream_that_says_nothing_is_not_kept(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "HELLO_DEADLINE_S", 0.1)
    wire = Wire(live)
    error = await fails(wire.read())
    assert isinstance(error, Unreachable)
    assert "no Hello came in time" in str(error)


async def test_a_replica_that_names_no_model_is_told_which_there_are(live: Live) -> None:
    for model in ("a", "b"):
        await live.publish("v1", model=model)
    wire = Wire(live)
    with pytest.raises(Refused) as caught:
        await wire.hello(replica_hello(model=""))
    assert (caught.value.reason, caught.value.fields["models"]) == ("MODEL_UNCLEAR", "a, b")


async def test_another_live_process_of_the_same_id_is_refused(live: Live) -> None:
    first = await Wire(live).hello(replica_hello(life="one"))
    with pytest.raises(Refused) as caught:
        await Wire(live).hello(replica_hello(life="two"))
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS")
    # The refused stream's end is not the first one's.
    await first.say(heartbeat=wire_pb.Heartbeat())
    assert (await live.status()).replicas[0].connected
    await first.close()
    assert (await until_event(live, fleet_pb2.EVENT_KIND_REPLICA_DETACHED)).replica_id == "r1"
    second = await Wire(live).hello(replica_hello(life="two"))
    await second.close()


async def test_the_same_process_replaces_its_older_stream(live: Live) -> None:
    first = await Wire(live).hello(replica_hello())
    second = await Wire(live).hello(replica_hello())
    error = await fails(first.read())
    assert "replaced by a newer stream" in str(error)
    await second.say(heartbeat=wire_pb.Heartbeat())
    assert (await live.status()).replicas[0].connected
    await second.close()


async def test_a_silent_member_loses_its_session_after_its_lease() -> None:
    async with running(heartbeat_s=0.2, lease_s=0.6) as live:
        silent = await Wire(live).hello(replica_hello())
        speaks = await Wire(live).hello(agent_hello())

        async def beat() -> None:
            while True:
                await speaks.say(heartbeat=wire_pb.Heartbeat())
                await asyncio.sleep(0.1)

        beating = asyncio.create_task(beat())
        assert "no heartbeat for a whole lease" in str(await fails(silent.read()))
        event = await until_event(live, fleet_pb2.EVENT_KIND_REPLICA_DETACHED)
        assert "no heartbeat" in event.message
        status = await live.status()
        assert (status.replicas[0].connected, status.nodes[0].connected) == (False, True)
        beating.cancel()
        await asyncio.wait({beating})
        await speaks.close()


async def test_a_reader_that_does_not_read_is_dropped_and_not_buffered_without_bound(live: Live) -> None:
    """The queue has a bound, and what lies beyond it is a reason to say Hello again."""
    wire = await Wire(live).hello(replica_hello())
    session = live.state.seats["r1"].session
    hub = live.coordinator.runtime.hub
    outlet = hub._outlets[session]
    tell = o.Tell(session, "r1", Ticket(1, 1), "u" * 100_000, o.End(committed=True))
    for _ in range(20 * ORDERS_MAX):
        hub.tell(tell, live.state, 1)
        await asyncio.sleep(0)
        if outlet.ended.is_set():
            break
    assert outlet.ended.is_set()
    assert outlet.queue.qsize() <= ORDERS_MAX
    with pytest.raises(Unreachable, match="too slow to read its orders"):
        await wire.order("apply")


async def test_a_write_that_blocks_ends_the_session(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "WRITE_DEADLINE_S", 0.2)
    wire = await Wire(live).hello(replica_hello())
    session = live.state.seats["r1"].session
    for _ in range(ORDERS_MAX - 10):
        live.coordinator.runtime.hub.tell(
            o.Tell(session, "r1", Ticket(1, 1), "u" * 1_000_000, o.End(committed=True)), live.state, 1
        )
    assert (await until_event(live, fleet_pb2.EVENT_KIND_REPLICA_DETACHED)).replica_id == "r1"
    assert session not in live.coordinator.runtime.hub._outlets
    wire.call.cancel()


async def test_a_report_with_a_digest_of_impossible_length_ends_the_session_and_nothing_else(live: Live) -> None:
    wire = await Wire(live).hello(replica_hello())
    await wire.say(report=wire_pb.Report(active_changed=wire_pb.ActiveChanged(active_digest=b"12345")))
    assert (await refused(wire.read())).reason == "BAD_DIGEST"
    await live.publish("v1")
    assert live.coordinator.runtime.failed is not None
    assert not live.coordinator.runtime.failed.done()


async def through_an_update(
    live: Live, agent: Wire, replica: Wire, routes: fleet_pb2.Routes | None = None
) -> wire_pb.Order:
    """Stages and prepares v2; the order that gives GO."""
    for _ in range(2):
        stage = await agent.order("stage")
        await agent.report(stage, staged=wire_pb.Staged(manifest_digest=stage.stage.manifest_digest))
    prepare = await replica.order("prepare")
    assert prepare.prepare.manifest_digest == digest_of("v2")
    await replica.report(prepare, prepared=wire_pb.Prepared(base_digest=digest_of("v1"), routes=routes))
    return await replica.order("apply")


async def test_an_update_goes_over_the_wire_from_start_to_commit(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1"))
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    go = await through_an_update(live, agent, replica)
    assert (go.apply.version, go.update_id, go.epoch, go.nonce) == ("v2", started.update.id, 1, go.number)
    await replica.report(
        go,
        applied=wire_pb.Applied(
            active_digest=digest_of("v2"),
            fingerprints=[b"f"],
            window=update_pb2.WindowTimes(quiesce_ms=1, apply_ms=2, resume_ms=3, total_ms=6),
        ),
    )
    assert (await replica.order("end")).end.committed
    status = await live.status()
    assert status.models[0].committed_version == "v2"
    (shown,) = status.replicas
    assert (shown.active_version, shown.desired_version, shown.ready) == ("v2", "v2", True)
    assert (shown.last_window.apply_ms, list(shown.fingerprints)) == (2, [b"f"])
    update = (await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))).update
    assert update.phase == update_pb2.UPDATE_PHASE_COMMITTED
    assert update.replicas[0].outcome == update_pb2.REPLICA_OUTCOME_APPLIED
    for wire in (agent, replica):
        await wire.close()


async def test_nodes_of_a_zone_take_an_image_from_each_other_and_status_shows_the_zone(live: Live) -> None:
    seed = await Wire(live).hello(agent_hello("seed", "v1", "v2", zone="west"))
    others = {name: await Wire(live).hello(agent_hello(name, "v1", zone=zone)) for name, zone in ZONED.items()}
    for version in ("v1", "v2"):
        await live.publish(version)
    replicas = [await Wire(live).hello(replica_hello(f"r-{name}", "v1", node=name)) for name in ZONED]
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    first = {name: (await wire.order("stage")).stage.sources[0].node_id for name, wire in others.items()}
    zones = {**ZONED, "seed": "west"}
    entries = [name for name, source in first.items() if zones[name] != zones[source]]
    assert sorted(zones[name] for name in entries) == ["east"]
    shown = (await soon(live.service.ListNodes(pb.ListNodesRequest()))).nodes
    assert {node.id: node.zone for node in shown} == zones
    planned = await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))
    assert planned.update.phase == update_pb2.UPDATE_PHASE_STAGING
    for wire in (seed, *others.values(), *replicas):
        await wire.close()


ZONED = {"a": "east", "b": "west", "c": "east", "d": "west"}


async def test_a_failed_apply_is_restored_and_told_in_status_and_events(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1"))
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    go = await through_an_update(live, agent, replica)
    failed = wire_pb.ApplyFailed(failure=wire_pb.APPLY_FAILURE_UNDONE, reason="no room", active_digest=digest_of("v1"))
    await replica.report(go, apply_failed=failed)
    back = await replica.order("apply")
    assert (back.apply.restore, back.apply.manifest_digest, back.apply.version) == (True, digest_of("v1"), "v1")
    await replica.report(back, applied=wire_pb.Applied(active_digest=digest_of("v1")))
    assert not (await replica.order("end")).end.committed
    update = (await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))).update
    assert update.phase == update_pb2.UPDATE_PHASE_ROLLED_BACK
    assert "no room" in update.reason
    assert "no room" in (await until_event(live, fleet_pb2.EVENT_KIND_UPDATE_ENDED)).message
    for wire in (agent, replica):
        await wire.close()


async def test_routes_and_kind_are_shown_as_they_were_said(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1", fingerprint_kind="k" * 128))
    assert not (await live.status()).replicas[0].HasField("routes")
    await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    routes = fleet_pb2.Routes(
        direct_modules=1,
        direct_bytes=1 << 40,
        assembled_modules=2,
        assembled_bytes=20,
        reload_modules=3,
        reload_bytes=30,
        reasons=["model.layers.0.mlp.experts: repacked after loading"],
        sources=["cuda-ipc: 5 MiB of GPU-1 of another process"],
    )
    await through_an_update(live, agent, replica, routes)
    (shown,) = (await live.status()).replicas
    assert (shown.routes, shown.fingerprint_kind) == (routes, "k" * 128)
    for wire in (agent, replica):
        await wire.close()


async def test_reasons_of_routes_are_cut_and_the_first_are_kept(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1"))
    await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    reasons = ["r" * 300, "r" * 3_000, *(f"reason {n}" for n in range(20_000))]
    await through_an_update(live, agent, replica, fleet_pb2.Routes(reasons=reasons, sources=reasons))
    (shown,) = (await live.status()).replicas
    cut = "r" * 300 + "... (2700 more characters)"
    assert list(shown.routes.reasons) == ["r" * 300, cut, *(f"reason {n}" for n in range(6))]
    assert shown.routes.sources == shown.routes.reasons
    for wire in (agent, replica):
        await wire.close()


async def test_two_replicas_that_differ_are_taken_back_and_the_log_says_which_rank(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    there = await Wire(live).hello(replica_hello("r0", "v2", fingerprints=[b"f"], fingerprint_kind="k"))
    replica = await Wire(live).hello(replica_hello("r1", "v1", fingerprint_kind="k"))
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    for _ in range(2):
        stage = await agent.order("stage")
        await agent.report(stage, staged=wire_pb.Staged(manifest_digest=stage.stage.manifest_digest))
    for wire in (there, replica):
        prepare = await wire.order("prepare")
        base = digest_of("v2" if wire is there else "v1")
        await wire.report(prepare, prepared=wire_pb.Prepared(base_digest=base))
    go = await replica.order("apply")
    await replica.report(go, applied=wire_pb.Applied(active_digest=digest_of("v2"), fingerprints=[b"g"]))
    assert (await replica.order("apply")).apply.restore
    event = await until_event(live, fleet_pb2.EVENT_KIND_REPLICA_FAILED)
    reason = "rank 0 of replica r1 on node n1 has another fingerprint than replica r0 for the same version"
    assert (event.replica_id, event.message) == ("r1", f"{reason}; either may be wrong")
    update = (await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))).update
    assert (update.phase, update.reason) == (update_pb2.UPDATE_PHASE_ROLLING_BACK, event.message)
    for wire in (agent, there, replica):
        await wire.close()


@pytest.mark.parametrize("what", ["prepare", "apply"])
async def test_a_refused_order_ends_what_it_was_part_of(live: Live, what: str) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1"))
    await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    if what == "apply":
        order = await through_an_update(live, agent, replica)
    else:
        for _ in range(2):
            stage = await agent.order("stage")
            await agent.report(stage, staged=wire_pb.Staged(manifest_digest=stage.stage.manifest_digest))
        order = await replica.order("prepare")
    refused = wire_pb.Answer(
        number=order.number, nonce=order.nonce, epoch=order.epoch, update_id=order.update_id, refusal="busy"
    )
    await replica.say(answer=refused)
    if what == "apply":
        back = await replica.order("apply")
        assert back.apply.restore
        await replica.report(back, applied=wire_pb.Applied(active_digest=digest_of("v1")))
    ended = await until_event(live, fleet_pb2.EVENT_KIND_UPDATE_ENDED)
    assert "refused: busy" in ended.message
    for wire in (agent, replica):
        await wire.close()


async def test_a_node_that_refuses_its_pins_ends_no_update(live: Live) -> None:
    agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1"))
    started = await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    pins = await agent.order("unpin")
    refused = wire_pb.Answer(number=pins.number, nonce=pins.nonce, epoch=pins.epoch, refusal="not now")
    await agent.say(answer=refused)
    await agent.order("stage")
    now = await soon(live.service.GetUpdate(pb.GetUpdateRequest(id=started.update.id)))
    assert now.update.phase == update_pb2.UPDATE_PHASE_STAGING
    for wire in (agent, replica):
        await wire.close()


async def test_a_member_of_another_cluster_is_refused_and_never_seated(live: Live) -> None:
    hello = replica_hello("r1", "v1")
    hello.cluster_id = "another"
    with pytest.raises(Refused, match="HOTWEIGHTS_ADOPT_CLUSTER") as caught:
        await Wire(live).hello(hello)
    assert caught.value.reason == "OTHER_CLUSTER"
    status = await soon(live.service.GetStatus(pb.GetStatusRequest()))
    assert not status.replicas


async def test_a_source_is_named_with_a_token_that_it_accepts(live: Live) -> None:
    source = await Wire(live).hello(agent_hello("n1", "v1", "v2", token_key=b"s" * 32))
    reader = await Wire(live).hello(agent_hello("n2", data_endpoint="tcp://10.0.0.2:7"))
    for version in ("v1", "v2"):
        await live.publish(version)
    replica = await Wire(live).hello(replica_hello("r1", "v1", node="n2"))
    await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
    stage = (await reader.order("stage")).stage
    (named,) = stage.sources
    assert (named.node_id, named.data_endpoint) == ("n1", "tcp://127.0.0.1:9")
    assert check_token(b"s" * 32, named.token, stage.manifest_digest, "n1", 0.0) == "n2"
    for wire in (source, reader, replica):
        await wire.close()


async def test_an_update_that_was_staging_goes_on_after_a_restart(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 's.db'}"
    async with running(store) as live:
        agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
        for version in ("v1", "v2"):
            await live.publish(version)
        replica = await Wire(live).hello(replica_hello("r1", "v1"))
        await soon(live.service.StartUpdate(pb.StartUpdateRequest(model="m", version="v2")))
        await agent.order("stage")
    async with running(store) as live:
        agent = await Wire(live).hello(agent_hello("n1", "v1", "v2"))
        replica = await Wire(live).hello(replica_hello("r1", "v1"))
        go = await through_an_update(live, agent, replica)
        assert go.epoch == 2
        await replica.report(go, applied=wire_pb.Applied(active_digest=digest_of("v2")))
        assert (await replica.order("end")).end.committed
        assert (await live.status()).models[0].committed_version == "v2"
        for wire in (agent, replica):
            await wire.close()


async def test_a_stop_ends_every_open_stream_at_once() -> None:
    """Sessions and watches are told why; none of them holds the stop up for its grace."""
    async with running(stop_grace_s=60.0) as live:
        wire = await Wire(live).hello(replica_hello())
        watch = live.service.WatchEvents(pb.WatchEventsRequest())
        await soon(watch.initial_metadata())
        stopping = asyncio.create_task(live.coordinator.stop())
        assert "the coordinator stops" in str(await fails(wire.read()))
        assert "the coordinator stops" in str(await fails(watch.read()))
        await soon(stopping)
