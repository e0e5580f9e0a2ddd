"""A coordinator over TLS on a real port: who is let in, what the others hear, and certificates that change."""

import asyncio
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.certificates import Authority, Files
from tests.coordinator.live import DEADLINE_S, Live, Wire, agent_hello, replica_hello, running

from hotweights.coordinator.config import BadSetting, Config
from hotweights.coordinator.server import Coordinator
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import worker_service_pb2, worker_service_pb2_grpc
from hotweights.wire import certificates
from hotweights.wire.access import ANONYMOUS, Access
from hotweights.wire.certificates import BadCertificate
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.errors import HotweightsError
from hotweights.wire.problems import call_error
from hotweights.worker_client.session import Session

TOKEN = "hw-secret-word"


class Place:
    """An authority, another one, and who has what of them."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.others = Authority(folder), Authority(folder, "other")
        self.server, self.client = self.ours.issue("server"), self.ours.issue("client")
        self.renewed = self.ours.issue("renewed")
        self.elsewhere = self.ours.issue("elsewhere", "elsewhere.example")
        self.stranger = self.others.issue("stranger")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@asynccontextmanager
async def serving(files: Files, *, client_ca: Path | None = None) -> AsyncIterator[Endpoint]:
    config = Config(
        endpoint=parse_endpoint("grpcs://127.0.0.1:0"),
        store="memory:",
        stop_grace_s=1.0,
        tls_cert=files.cert,
        tls_key=files.key,
        client_ca=client_ca,
    )
    config.check()
    coordinator = Coordinator(config)
    await coordinator.start()
    try:
        yield coordinator.endpoint
    finally:
        await coordinator.stop()


def shows(files: Files, ca: Path | None = None, **more: Any) -> Access:
    return Access(ca or files.ca, files.cert, files.key, **more)


async def ask(endpoint: Endpoint, access: Access) -> pb.GetStatusResponse:
    """Raises what a client of this package raises."""
    try:
        async with open_channel(endpoint, access) as channel:
            stub: Any = rpc.CoordinatorServiceStub(channel)
            answer: pb.GetStatusResponse = await stub.GetStatus(pb.GetStatusRequest(), timeout=DEADLINE_S)
            return answer
    except grpc.aio.AioRpcError as error:
        raise call_error(error, endpoint, access) from error


async def refused(endpoint: Endpoint, access: Access) -> str:
    with pytest.raises(HotweightsError) as caught:
        await ask(endpoint, access)
    assert "\n" not in str(caught.value)
    assert "last error" not in str(caught.value)
    return str(caught.value)


def shown_by(endpoint: Endpoint, ca: Path) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection((endpoint.host, endpoint.port), timeout=DEADLINE_S) as sock,
        context.wrap_socket(sock, server_hostname=endpoint.host) as line,
    ):
        certificate = line.getpeercert()
        assert certificate is not None
        return int(str(certificate["serialNumber"]), 16)


async def test_it_says_that_it_speaks_tls_and_answers_who_trusts_it(place: Place) -> None:
    async with serving(place.server) as endpoint:
        assert str(endpoint).startswith("grpcs://127.0.0.1:")
        assert (await ask(endpoint, Access(ca=place.ours.file))).cluster_id
        assert (await ask(replace(endpoint, host="localhost"), Access(ca=place.ours.file))).cluster_id


async def test_with_a_client_authority_only_its_clients_get_in(place: Place) -> None:
    async with serving(place.server, client_ca=place.ours.file) as endpoint:
        assert (await ask(endpoint, shows(place.client))).cluster_id
        said = await refused(endpoint, Access(ca=place.ours.file))
        assert "wants a client certificate (--cert and --key" in said
        said = await refused(endpoint, shows(place.stranger, ca=place.ours.file))
        assert f"it does not accept {place.stranger.cert}" in said


Refusal = tuple[Callable[[Place], Files], Callable[[Place], Access], str]
REFUSALS: dict[str, Refusal] = {
    "another authority": (
        lambda place: place.server,
        lambda place: Access(ca=place.others.file),
        "other.pem did not sign it",
    ),
    "no authority": (lambda place: place.server, lambda place: ANONYMOUS, "name its authority with --ca"),
    "another name": (
        lambda place: place.elsewhere,
        lambda place: Access(ca=place.ours.file),
        "its certificate is not for the name 127.0.0.1",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_a_coordinator_that_is_not_to_be_believed_is_not_asked_anything(what: str, place: Place) -> None:
    files, access, said = REFUSALS[what]
    async with serving(files(place)) as endpoint:
        text = await refused(endpoint, access(place))
        assert text.startswith(f"coordinator {endpoint}: ")
        assert said in text


async def test_a_certificate_that_ran_out_while_it_served_is_said_to_have(place: Place) -> None:
    """No coordinator starts with one: this is grpc's own server."""
    over = place.ours.issue("over", ends=2001)
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(over.key.read_bytes(), over.cert.read_bytes())])
    endpoint = Endpoint("127.0.0.1", server.add_secure_port("127.0.0.1:0", credentials), tls=True)
    await server.start()
    assert "its certificate has expired; is this machine's clock right?" in await refused(
        endpoint, Access(ca=place.ours.file)
    )
    await server.stop(0)


async def test_plaintext_and_tls_do_not_meet_and_the_client_is_told_what_to_write(place: Place) -> None:
    async with serving(place.server) as endpoint:
        said = await refused(replace(endpoint, tls=False), ANONYMOUS)
        assert f"if it speaks TLS, write grpcs://{endpoint.target}" in said
    async with running() as live:
        said = await refused(replace(live.endpoint, tls=True), Access(ca=place.ours.file))
        assert f"it speaks no TLS: write tcp://{live.endpoint.target}" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tls_cert": Path("c")}, "--tls-cert goes with --tls-key"),
        ({"tls_key": Path("k")}, "--tls-key goes with --tls-cert"),
        ({"client_ca": Path("a")}, "--client-ca asks for client certificates"),
        ({"endpoint": parse_endpoint("grpcs://127.0.0.1:0")}, "which takes --tls-cert and --tls-key"),
        (
            {"endpoint": parse_endpoint("unix:/x"), "tls_cert": Path("c"), "tls_key": Path("k")},
            "a socket of this machine",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSetting, match=said):
        Config(**{"endpoint": parse_endpoint("127.0.0.1:0"), "store": "memory:", **settings}).check()


def test_with_a_certificate_other_machines_may_reach_it_without_insecure(place: Place) -> None:
    endpoint = parse_endpoint("0.0.0.0:5555")
    Config(endpoint=endpoint, store="memory:", tls_cert=place.server.cert, tls_key=place.server.key).check()


async def test_it_does_not_start_with_files_that_are_no_good(place: Place) -> None:
    over = place.ours.issue("over", ends=2001)
    config = Config(endpoint=parse_endpoint("grpcs://127.0.0.1:0"), store="memory:")
    for files, ca, said in (
        (over, None, "certificate has expired"),
        (Files(place.ours.file, place.server.cert, place.client.key), None, "not that of the certificate"),
        (place.server, place.client.cert, "none of an authority"),
    ):
        with pytest.raises(BadCertificate, match=said):
            Coordinator(replace(config, tls_cert=files.cert, tls_key=files.key, client_ca=ca))


async def test_a_renewed_certificate_is_shown_to_new_connections_and_open_streams_live_on(place: Place) -> None:
    renewed = serial(place.renewed)
    access = Access(ca=place.ours.file)
    async with serving(place.server) as endpoint, open_channel(endpoint, access) as channel:
        wire = await Wire(Live(None, channel, None, worker_service_pb2_grpc.WorkerServiceStub(channel))).hello(  # type: ignore[arg-type]
            agent_hello("n1")
        )
        before = await asyncio.to_thread(shown_by, endpoint, place.ours.file)
        assert before == serial(place.server)
        place.server.become(place.renewed)
        assert await asyncio.to_thread(shown_by, endpoint, place.ours.file) == renewed
        assert (await ask(endpoint, access)).nodes[0].connected
        await wire.say(heartbeat=worker_service_pb2.Heartbeat())
        assert (await ask(endpoint, access)).nodes[0].connected, "its stream is the one from before"
        await wire.close()


async def test_a_broken_certificate_leaves_the_old_one_in_force_until_a_good_one_comes(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "TRY_AGAIN_S", 0.0)
    old, renewed = serial(place.server), serial(place.renewed)
    async with serving(place.server) as endpoint:
        place.server.cert.write_bytes(place.renewed.cert.read_bytes()[:200])
        assert await asyncio.to_thread(shown_by, endpoint, place.ours.file) == old
        place.server.cert.write_bytes(place.renewed.cert.read_bytes())
        assert await asyncio.to_thread(shown_by, endpoint, place.ours.file) == old, "the key is the old one still"
        assert "the old ones serve on" in caplog.text
        assert "PRIVATE" not in caplog.text
        place.server.key.write_bytes(place.renewed.key.read_bytes())
        assert await asyncio.to_thread(shown_by, endpoint, place.ours.file) == renewed


async def test_a_client_authority_that_changes_lets_others_in(place: Place, tmp_path: Path) -> None:
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(place.ours.file.read_bytes())
    stranger = shows(place.stranger, ca=place.ours.file)
    async with serving(place.server, client_ca=trusted) as endpoint:
        await refused(endpoint, stranger)
        trusted.write_bytes(place.ours.file.read_bytes() + place.others.file.read_bytes())
        assert (await ask(endpoint, stranger)).cluster_id
        assert (await ask(endpoint, shows(place.client))).cluster_id


def serial(files: Files) -> int:
    from cryptography import x509

    return x509.load_pem_x509_certificate(files.cert.read_bytes()).serial_number


class Hearing(worker_service_pb2_grpc.WorkerServiceServicer, rpc.CoordinatorServiceServicer):
    """Remembers what every call showed."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.streams: asyncio.Queue[str] = asyncio.Queue()

    def _hear(self, context: Any) -> str:
        self.shown.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.shown[-1]

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        self._hear(context)
        return pb.GetStatusResponse(cluster_id="c")

    async def GetManifest(self, request: Any, context: Any) -> AsyncIterator[pb.GetManifestResponse]:
        self._hear(context)
        yield pb.GetManifestResponse()

    async def PublishVersion(self, requests: Any, context: Any) -> pb.PublishVersionResponse:
        self._hear(context)
        async for _ in requests:
            pass
        return pb.PublishVersionResponse()

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[worker_service_pb2.SessionResponse]:
        self.streams.put_nowait(self._hear(context))
        await anext(aiter(requests))
        welcome = worker_service_pb2.Welcome(cluster_id="c", epoch=1, heartbeat_s=60.0)
        yield worker_service_pb2.SessionResponse(welcome=welcome)
        await asyncio.sleep(DEADLINE_S)


@pytest.fixture
async def hearing() -> AsyncIterator[tuple[Hearing, Endpoint]]:
    hears, server = Hearing(), grpc.aio.server()
    rpc.add_CoordinatorServiceServicer_to_server(hears, server)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(hears, server)
    endpoint = Endpoint("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    yield hears, endpoint
    await server.stop(0)


async def test_the_token_is_shown_on_calls_of_every_kind(hearing: tuple[Hearing, Endpoint]) -> None:
    hears, endpoint = hearing

    async def parts() -> AsyncIterator[pb.PublishVersionRequest]:
        yield pb.PublishVersionRequest()

    async with open_channel(endpoint, Access(token=TOKEN)) as channel:
        stub: Any = rpc.CoordinatorServiceStub(channel)
        await stub.GetStatus(pb.GetStatusRequest(), timeout=DEADLINE_S)
        assert len([part async for part in stub.GetManifest(pb.GetManifestRequest(), timeout=DEADLINE_S)]) == 1
        await stub.PublishVersion(parts(), timeout=DEADLINE_S, metadata=(("more", "of it"),))
    assert hears.shown == [f"Bearer {TOKEN}"] * 3


async def test_a_session_shows_the_token_that_its_file_holds_when_the_stream_begins(
    hearing: tuple[Hearing, Endpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hears, endpoint = hearing
    file = tmp_path / "token"
    file.write_text("first")
    hello = worker_service_pb2.Hello(replica=worker_service_pb2.ReplicaHello(replica_id="r1"))

    async def take(order: Any) -> str:
        return ""

    session = Session(endpoint, lambda: hello, take, access=Access(token_file=file))
    running_session = asyncio.ensure_future(session.run())
    assert await asyncio.wait_for(hears.streams.get(), DEADLINE_S) == "Bearer first"
    file.write_text("")
    session.refresh()
    await until(lambda: f"{file} is empty" in session.refusal)
    file.write_text("second")
    assert await asyncio.wait_for(hears.streams.get(), DEADLINE_S) == "Bearer second"
    await until(lambda: session.connected)
    assert session.refusal == ""
    assert "first" not in caplog.text
    assert "second" not in caplog.text
    await session.close()
    await asyncio.wait_for(running_session, DEADLINE_S)


async def until(holds: Callable[[], bool]) -> None:
    async def come() -> None:
        while not holds():  # noqa: ASYNC110  what is awaited sets no event
            await asyncio.sleep(0.01)

    await asyncio.wait_for(come(), DEADLINE_S)


async def test_a_session_over_mutual_tls_takes_its_renewed_certificate_when_it_reconnects(place: Place) -> None:
    mine = place.others.issue("mine")
    async with serving(place.server, client_ca=place.ours.file) as endpoint:

        async def take(order: Any) -> str:
            return ""

        session = Session(endpoint, replica_hello, take, access=shows(mine, ca=place.ours.file))
        running_session = asyncio.ensure_future(session.run())
        await asyncio.sleep(0.5)
        assert not session.connected
        mine.become(place.client)
        await until(lambda: session.connected)
        await session.close()
        await asyncio.wait_for(running_session, DEADLINE_S)


async def test_health_reflection_and_buf_curl_work_over_mutual_tls(place: Place) -> None:
    curl = [".venv-tools/bin/buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    async with serving(place.server, client_ca=place.ours.file) as endpoint:
        base = f"https://{endpoint.target}"

        async def call(method: str, *options: str) -> "subprocess.CompletedProcess[str]":
            command = [*curl, *options, "--data", "{}", f"{base}/{method}"]
            return await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
            )

        shown = ("--cacert", str(place.ours.file), "--cert", str(place.client.cert), "--key", str(place.client.key))
        for method, field in (
            ("hotweights.v1.CoordinatorService/GetStatus", "clusterId"),
            ("grpc.health.v1.Health/Check", "status"),
        ):
            done = await call(method, *shown)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)[field]
        assert (await call("grpc.health.v1.Health/Check", *shown[:2])).returncode != 0
