"""The gate on a real coordinator: every method of every service, for every role and for strangers."""

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blake3
import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.coordinator.live import (
    DEADLINE_S,
    Live,
    Wire,
    agent_hello,
    manifest_of,
    parts,
    refused,
    replica_hello,
    running,
    soon,
)

from hotweights.coordinator.access import refusals as refusals_module
from hotweights.coordinator.access import tokens as tokens_module
from hotweights.coordinator.access.gate import _CALLER, Gate
from hotweights.coordinator.access.refusals import Refusals, host_of
from hotweights.coordinator.access.roles import ALLOWED, OPEN, START_UPDATE, Role, allowed
from hotweights.coordinator.access.tokens import Caller, Tokens, digest_of, new_token
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import fleet_pb2, model_pb2, worker_service_pb2
from hotweights.wire.allowance import Rate
from hotweights.wire.channel import open_channel
from hotweights.wire.errors import Refused

TOKENS = {role: new_token() for role in Role}
SERVICES: tuple[Any, ...] = (
    *pb.DESCRIPTOR.services_by_name.values(),
    *worker_service_pb2.DESCRIPTOR.services_by_name.values(),
    *health_pb2.DESCRIPTOR.services_by_name.values(),
    *reflection_pb2.DESCRIPTOR.services_by_name.values(),
)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}


def file_of(folder: Path, tokens: dict[Role, str] = TOKENS) -> Path:
    path = folder / "tokens"
    path.write_text("".join(f"{role.value} the-{role.value} {token}\n" for role, token in tokens.items()))
    path.chmod(0o600)
    return path


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything refused is written down."""
    monkeypatch.setattr(refusals_module, "OF_ONE_PEER", Rate(10_000, 1.0))
    monkeypatch.setattr(refusals_module, "OF_ALL_PEERS", Rate(10_000, 1.0))


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with running(tokens=str(file_of(tmp_path))) as started:
        yield started


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def empty_request() -> AsyncIterator[bytes]:
    yield b""


def call(channel: grpc.aio.Channel, path: str, metadata: Any) -> Any:
    """The method called raw, with one empty request; awaits or reads to the first answer."""
    method = METHODS[path]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    request = empty_request() if method.client_streaming else b""
    started = getattr(channel, kind)(path)(request, metadata=metadata, timeout=2 * DEADLINE_S)
    return started.read() if method.server_streaming else started


async def let_in(channel: grpc.aio.Channel, path: str, metadata: Any, expected: str = "") -> str:
    """ "" if the call passed the gate, whatever came of it; else the reason why it did not."""
    # A watch that is let in has nothing to say yet.
    silent = not expected and path.endswith("/WatchEvents")
    try:
        await asyncio.wait_for(call(channel, path, metadata), 0.5 if silent else DEADLINE_S)
    except asyncio.TimeoutError:
        assert silent, f"{path} was not answered"
        return ""
    except grpc.aio.AioRpcError as error:
        refusal = await refused(_failed(error))
        return refusal.reason if refusal.reason in ("TOKEN_MISSING", "TOKEN_UNKNOWN", "ROLE_TOO_LOW") else ""
    return ""


async def _failed(error: grpc.aio.AioRpcError) -> None:
    raise error


def test_every_method_of_every_service_has_its_row_in_the_table() -> None:
    missing = set(METHODS) - set(ALLOWED) - OPEN
    assert not missing, f"say in access/roles.py who may call {sorted(missing)}"
    assert not (set(ALLOWED) | OPEN) - set(METHODS), "rows of methods that there are not"
    assert not set(ALLOWED) & OPEN


async def test_every_method_that_the_server_has_is_known_to_the_table(live: Live) -> None:
    # By reflection: a service that is added to the server and to no list here is found.
    stub = live.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asking = stub(metadata=bearer(TOKENS[Role.VIEWER]))
    await asking.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await soon(asking.read())).list_services_response.service}
    asking.cancel()
    assert listed == {service.full_name for service in SERVICES}


def test_only_operators_may_call_what_the_table_does_not_have() -> None:
    assert allowed("/hotweights.v1.CoordinatorService/Invented") == {Role.OPERATOR}


def test_an_operator_may_call_everything() -> None:
    assert all(Role.OPERATOR in roles for roles in ALLOWED.values())


def test_a_viewer_changes_nothing() -> None:
    reads = ("Get", "List", "Plan", "Watch", "ServerReflectionInfo")
    theirs = {path for path, roles in ALLOWED.items() if Role.VIEWER in roles}
    assert all(path.rpartition("/")[2].startswith(reads) for path in theirs)


async def test_each_role_gets_through_where_the_table_says_so_and_nowhere_else(live: Live, plenty: None) -> None:
    wrong = []
    for path in METHODS:
        for role, token in TOKENS.items():
            expected = "" if path in OPEN or role in allowed(path) else "ROLE_TOO_LOW"
            if (got := await let_in(live.channel, path, bearer(token), expected)) != expected:
                wrong.append((path, role, got))
    assert not wrong


STRANGERS = {
    "nothing": ((), "TOKEN_MISSING"),
    "another scheme": ((("authorization", f"Basic {TOKENS[Role.OPERATOR]}"),), "TOKEN_MISSING"),
    "no scheme": ((("authorization", TOKENS[Role.OPERATOR]),), "TOKEN_MISSING"),
    "an empty token": ((("authorization", "Bearer "),), "TOKEN_MISSING"),
    "two tokens": (2 * bearer(TOKENS[Role.OPERATOR]), "TOKEN_MISSING"),
    "an unknown token": (bearer(new_token()), "TOKEN_UNKNOWN"),
    "the hash of a token": (bearer("sha256:" + digest_of(TOKENS[Role.OPERATOR]).hex()), "TOKEN_UNKNOWN"),
    "half a token": (bearer(TOKENS[Role.OPERATOR][:-1]), "TOKEN_UNKNOWN"),
    "a very long token": (bearer("x" * 3000), "TOKEN_UNKNOWN"),
}


@pytest.mark.parametrize("shown", STRANGERS)
async def test_a_stranger_gets_to_the_health_check_and_nowhere_else(live: Live, plenty: None, shown: str) -> None:
    metadata, reason = STRANGERS[shown]
    for path in METHODS:
        expected = "" if path in OPEN else reason
        assert await let_in(live.channel, path, metadata, expected) == expected, path


async def test_strangers_who_call_at_once_are_all_told_why(live: Live) -> None:
    # A server that keeps no call waiting resets some of them: a bare CANCELLED, and no event.
    for _ in range(4):
        calls = (status(live, new_token()) for _ in range(25))
        answers = await soon(asyncio.gather(*(refused(call) for call in calls)))
        assert {(answer.code, answer.reason) for answer in answers} == {
            (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN")
        }


async def test_a_scheme_is_read_in_any_case(live: Live) -> None:
    metadata = (("authorization", f"bEARER  {TOKENS[Role.VIEWER]} "),)
    await soon(live.service.GetStatus(pb.GetStatusRequest(), metadata=metadata))


async def test_a_refusal_says_what_to_do_and_carries_its_fields(live: Live) -> None:
    missing = await refused(live.service.GetStatus(pb.GetStatusRequest()))
    assert missing.code is grpc.StatusCode.UNAUTHENTICATED
    assert "--token-file or HOTWEIGHTS_TOKEN_FILE" in missing.message
    low = await refused(live.service.RollBack(pb.RollBackRequest(model="m"), metadata=bearer(TOKENS[Role.WORKER])))
    assert low.code is grpc.StatusCode.PERMISSION_DENIED
    assert low.message == "RollBack takes a token of role operator; yours is a worker's"
    path = "/hotweights.v1.CoordinatorService/RollBack"
    assert low.fields == {"role": "worker", "needed": "operator", "method": path}


async def publish(live: Live, role: Role, **header: Any) -> Any:
    blob = manifest_of("v1")
    fields = {"model": "m", "version": "v1", "manifest_digest": blake3.blake3(blob).digest(), **header}
    request = parts(pb.PublishHeader(**fields), blob)
    return await soon(live.service.PublishVersion(request, metadata=bearer(TOKENS[role])))


async def test_a_publisher_publishes_and_starts_no_update(live: Live) -> None:
    refusal = await refused(publish(live, Role.PUBLISHER, start_update=True))
    assert (refusal.reason, refusal.fields["needed"]) == ("ROLE_TOO_LOW", "operator")
    assert refusal.message.startswith("StartUpdate takes a token of role operator")
    assert not live.state.versions, "nothing of it was done"
    noted = await until_event_with(live, Role.VIEWER)
    assert (noted.refusal.name, noted.refusal.method) == (
        "the-publisher",
        "/hotweights.v1.CoordinatorService/StartUpdate",
    )
    assert (await publish(live, Role.PUBLISHER)).version.name == "v1"
    assert (await publish(live, Role.OPERATOR, start_update=True)).version.name == "v1"


async def until_event_with(live: Live, role: Role) -> fleet_pb2.Event:
    """The first refusal in the log."""
    watch = live.service.WatchEvents(pb.WatchEventsRequest(from_revision=1), metadata=bearer(TOKENS[role]))
    try:
        while True:
            for event in (await soon(watch.read())).events:
                if event.kind == fleet_pb2.EVENT_KIND_CALL_REFUSED:
                    return event  # type: ignore[no-any-return]
    finally:
        watch.cancel()


async def refusals(live: Live) -> list[fleet_pb2.Event]:
    request = pb.GetStatusRequest(event_count=100)
    status = await soon(live.service.GetStatus(request, metadata=bearer(TOKENS[Role.VIEWER])))
    return [event for event in status.events if event.kind == fleet_pb2.EVENT_KIND_CALL_REFUSED]


async def test_refused_calls_are_events_with_who_and_what_and_without_the_token(live: Live) -> None:
    guess = new_token()
    await refused(live.service.GetStatus(pb.GetStatusRequest(), metadata=bearer(guess)))
    await refused(live.service.CancelUpdate(pb.CancelUpdateRequest(), metadata=bearer(TOKENS[Role.VIEWER])))
    await until_event_with(live, Role.VIEWER)
    unknown, low = await refusals(live)
    assert (unknown.refusal.peer, unknown.refusal.reason, unknown.refusal.name) == ("127.0.0.1", "TOKEN_UNKNOWN", "")
    assert low.refusal == fleet_pb2.Refusal(
        peer="127.0.0.1",
        name="the-viewer",
        role="viewer",
        method="/hotweights.v1.CoordinatorService/CancelUpdate",
        reason="ROLE_TOO_LOW",
    )
    assert low.message == (
        "127.0.0.1 (viewer the-viewer): /hotweights.v1.CoordinatorService/CancelUpdate refused, ROLE_TOO_LOW"
    )
    for secret in (guess, TOKENS[Role.VIEWER], digest_of(TOKENS[Role.VIEWER]).hex()):
        assert secret.encode() not in unknown.SerializeToString() + low.SerializeToString()


async def test_a_flood_of_refusals_is_counted_and_does_not_fill_the_log(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(60):
        await refused(live.service.GetStatus(pb.GetStatusRequest()))
    written = await refusals(live)
    assert len(written) == refusals_module.OF_ONE_PEER.burst
    passed_over = 60 - len(written)
    # Its turn comes again: the next one tells how many there were meanwhile.
    an_hour = 3600.0
    allowance = live.coordinator._refusals._allowance
    monkeypatch.setattr(allowance, "_clock", lambda clock=allowance._clock: clock() + an_hour)
    await refused(live.service.GetStatus(pb.GetStatusRequest()))
    last = (await refusals(live))[-1]
    assert last.refusal.passed_over == passed_over
    assert f"{passed_over} more refusals" in last.message


async def test_a_member_speaks_with_a_workers_token_and_is_refused_with_a_viewers(live: Live) -> None:
    for role in (Role.VIEWER, Role.PUBLISHER):
        wire = await speaking(live, TOKENS[role])
        assert (await refused(wire.call.read())).reason == "ROLE_TOO_LOW"
    assert (await refused(live.workers.Session().read())).reason == "TOKEN_MISSING"
    wire = await speaking(live, TOKENS[Role.WORKER])
    await wire.hello(agent_hello("n1"))
    assert live.state.nodes["n1"].connected
    await wire.close()


async def speaking(live: Live, token: str) -> Wire:
    """A session's stream that has said nothing yet."""
    wire = Wire.__new__(Wire)
    wire.welcome = None
    wire.call = live.workers.Session(metadata=bearer(token))
    return wire


async def test_what_an_agents_socket_refused_is_in_the_log_with_its_node(live: Live) -> None:
    wire = await speaking(live, TOKENS[Role.WORKER])
    await wire.hello(agent_hello("n1"))
    refusal = fleet_pb2.Refusal(peer="uid 1001, pid 77", method="connect", reason="PEER_REFUSED", passed_over=3)
    report = worker_service_pb2.Report(peer_refused=worker_service_pb2.PeerRefused(refusal=refusal))
    await wire.say(report=report)
    event = await until_event_with(live, Role.VIEWER)
    assert (event.node_id, event.refusal) == ("n1", refusal)
    refusal.method, refusal.passed_over = "x" * 100_000, (1 << 64) - 1
    await wire.say(report=worker_service_pb2.Report(peer_refused=worker_service_pb2.PeerRefused(refusal=refusal)))
    for _ in range(100):
        if len(written := await refusals(live)) == 2:
            break
        await asyncio.sleep(0.05)
    assert (written[1].refusal.method, written[1].refusal.passed_over) == ("x" * 200, 1 << 32)
    await wire.close()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "LOOK_EVERY_S", 0.05)


async def test_a_revoked_token_ends_its_streams_and_no_other(quickly: None, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    async with running(tokens=str(path)) as live, watching(live, Role.VIEWER) as theirs:
        session = await speaking(live, TOKENS[Role.WORKER])
        await session.hello(replica_hello("r1", "v1"))
        async with watching(live, Role.OPERATOR) as ours:
            kept = {role: TOKENS[role] for role in (Role.PUBLISHER, Role.OPERATOR)}
            replace(path, kept)
            assert (await the_end_of(theirs)).reason == "TOKEN_UNKNOWN"
            assert (await the_end_of(session.call)).reason == "TOKEN_UNKNOWN"
            read = {event.kind async for event in events(ours, fleet_pb2.EVENT_KIND_REPLICA_DETACHED)}
            assert fleet_pb2.EVENT_KIND_REPLICA_DETACHED in read


REQUESTS = {
    "/hotweights.v1.CoordinatorService/SetModelPolicy": pb.SetModelPolicyRequest(
        model="m", policy=model_pb2.MODEL_POLICY_AUTO
    ),
    "/hotweights.v1.CoordinatorService/DeleteVersion": pb.DeleteVersionRequest(model="m", version="v1"),
}


async def test_a_token_that_is_revoked_before_the_request_has_come_does_nothing(
    quickly: None, plenty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(tmp_path)
    async with running(tokens=str(path)) as live:
        await publish(live, Role.OPERATOR)
        before, calls = live.state, await only_headers(live, monkeypatch)
        replace(path, {role: TOKENS[role] for role in Role if role is not Role.OPERATOR})
        await until_unknown(live, TOKENS[Role.OPERATOR])
        reasons = {method: await what_comes_of(started, request_of(method)) for method, started in calls.items()}
        assert {method: reason for method, reason in reasons.items() if reason != "TOKEN_UNKNOWN"} == {}
        assert (live.state.models, live.state.versions) == (before.models, before.versions)
        await until_noted(live, "the-operator", set(REQUESTS))


def request_of(method: str) -> bytes:
    data: bytes = REQUESTS[method].SerializeToString() if method in REQUESTS else b""
    return data


async def until_noted(live: Live, name: str, methods: set[str]) -> None:
    for _ in range(100):
        if methods <= {event.refusal.method for event in await refusals(live) if event.refusal.name == name}:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no event says that {name} was refused {methods}")


async def only_headers(live: Live, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A call of every guarded method, let in with an operator's token and silent so far."""
    tokens, found = live.coordinator._tokens, list[bytes]()
    assert tokens is not None
    find = tokens.find

    def finding(token: bytes) -> Caller | None:
        found.append(token)
        return find(token)

    monkeypatch.setattr(tokens, "find", finding)
    methods, metadata = set(METHODS) - OPEN, bearer(TOKENS[Role.OPERATOR])
    calls: dict[str, Any] = {path: live.channel.stream_stream(path)(metadata=metadata) for path in methods}
    for _ in range(100):
        if len(found) == len(methods):
            break
        await asyncio.sleep(0.05)
    assert len(found) == len(methods)
    return calls


async def until_unknown(live: Live, token: str) -> None:
    for _ in range(100):
        if await let_in(live.channel, "/hotweights.v1.CoordinatorService/GetStatus", bearer(token)):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the token is still good")


async def what_comes_of(started: Any, request: bytes) -> str:
    """The reason why the call is refused once its request has come; "answered" where it is not."""

    async def answer() -> None:
        # A stream may have been ended before it asked for anything.
        with suppress(asyncio.InvalidStateError):
            await started.write(request)
            await started.done_writing()
        await started.read()

    try:
        await soon(answer())
    except Refused as refusal:
        return refusal.reason
    except asyncio.TimeoutError:
        return "open"
    return "answered"


async def test_a_publication_whose_token_is_revoked_on_the_way_ends(quickly: None, tmp_path: Path) -> None:
    path, blob = file_of(tmp_path), manifest_of("v1")

    async def slowly() -> AsyncIterator[pb.PublishVersionRequest]:
        header = pb.PublishHeader(model="m", version="v1", manifest_digest=blake3.blake3(blob).digest())
        yield await anext(parts(header, blob))
        await asyncio.sleep(2 * DEADLINE_S)

    async with running(tokens=str(path)) as live:
        publishing = live.service.PublishVersion(slowly(), metadata=bearer(TOKENS[Role.PUBLISHER]))
        await until_open(live)
        replace(path, {role: TOKENS[role] for role in Role if role is not Role.PUBLISHER})
        assert (await refused(publishing)).reason == "TOKEN_UNKNOWN"
        assert not live.state.versions


async def until_open(live: Live) -> None:
    gate = live.coordinator._gate
    assert gate is not None
    for _ in range(100):
        if gate._open:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no call is followed")


def test_what_another_method_would_take_is_asked_of_a_token_that_is_still_good(tmp_path: Path) -> None:
    tokens = Tokens(file_of(tmp_path))
    gate = Gate(tokens, Refusals(lambda event: True, time.monotonic))
    context: Any = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")

    def require() -> None:
        _CALLER.set(tokens.find(TOKENS[Role.OPERATOR].encode()))
        gate.require(START_UPDATE, context)
        file_of(tmp_path, {Role.VIEWER: TOKENS[Role.VIEWER]})
        assert tokens.look()
        with pytest.raises(Refused, match="does not know the token"):
            gate.require(START_UPDATE, context)

    contextvars.copy_context().run(require)


async def test_a_token_that_is_added_is_good_without_a_restart(quickly: None, tmp_path: Path) -> None:
    path, fresh = file_of(tmp_path), new_token()
    async with running(tokens=str(path)) as live:
        assert (await refused(status(live, fresh))).reason == "TOKEN_UNKNOWN"
        replace(path, {**TOKENS, Role.WORKER: fresh})
        for _ in range(100):
            if await let_in(live.channel, "/hotweights.v1.CoordinatorService/GetStatus", bearer(fresh)) == "":
                break
            await asyncio.sleep(0.05)
        await soon(status(live, fresh))


def status(live: Live, token: str) -> Any:
    return live.service.GetStatus(pb.GetStatusRequest(), metadata=bearer(token))


def replace(path: Path, tokens: dict[Role, str]) -> None:
    """Written beside it and moved over it, as a careful operator does."""
    beside = path.parent / "beside"
    beside.mkdir()
    file_of(beside, tokens).rename(path)


async def the_end_of(stream: Any) -> Refused:
    """The refusal that ends it, past what comes before."""
    while True:
        try:
            await soon(stream.read())
        except Refused as refusal:
            return refusal


@asynccontextmanager
async def watching(live: Live, role: Role) -> AsyncIterator[Any]:
    watch = live.service.WatchEvents(pb.WatchEventsRequest(from_revision=1), metadata=bearer(TOKENS[role]))
    yield watch
    watch.cancel()


async def events(watch: Any, last: int) -> AsyncIterator[fleet_pb2.Event]:
    while True:
        for event in (await soon(watch.read())).events:
            yield event
            if event.kind == last:
                return


async def test_a_client_that_hangs_up_leaves_no_open_call_behind(live: Live) -> None:
    gate = live.coordinator._gate
    assert gate is not None
    async with watching(live, Role.VIEWER) as watch:
        await soon(watch.initial_metadata())
        assert len(gate._open) == 1
    for _ in range(100):
        if not gate._open:
            break
        await asyncio.sleep(0.05)
    assert not gate._open


async def test_a_coordinator_that_stops_ends_guarded_streams_as_it_ends_others(tmp_path: Path) -> None:
    async with running(tokens=str(file_of(tmp_path))) as live:
        watch = live.service.WatchEvents(pb.WatchEventsRequest(), metadata=bearer(TOKENS[Role.VIEWER]))
        await soon(watch.initial_metadata())
        stopping = asyncio.create_task(live.coordinator.stop())
        with pytest.raises(Exception, match="the coordinator stops"):
            await soon(watch.read())
        await asyncio.wait_for(stopping, DEADLINE_S)
        live.coordinator = _Stopped()  # type: ignore[assignment]


class _Stopped:
    async def stop(self) -> None:
        pass


async def test_without_tokens_everyone_may_do_everything() -> None:
    async with running() as live:
        await live.publish("v1", start_update=True)
        assert (await live.status()).versions[0].name == "v1"


async def test_an_unknown_method_is_unimplemented_for_strangers_too(live: Live) -> None:
    async with open_channel(live.endpoint) as channel:
        unknown: Any = channel.unary_unary("/hotweights.v1.CoordinatorService/Invented")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"", timeout=DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:40112", "10.0.0.7"),
        ("ipv6:%5B::1%5D:40112", "::1"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::1%eth0"),
        ("unix:", "unix"),
        ("unix:/run/x", "unix"),
        ("", ""),
    ],
)
def test_a_peer_is_named_by_its_host(peer: str, host: str) -> None:
    assert host_of(peer) == host
