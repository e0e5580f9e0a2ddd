"""The coordinator's services on a real runtime and a real SQLite file: any message of the protocol, from anybody.

Whatever comes, a call ends with an answer or a rich refusal, and the leader lives.
"""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import blake3
import grpc
from google.protobuf.message import DecodeError, Message
from tests.fuzz.kinds import Cursor, Target, parts

from hotweights.coordinator.access.refusals import Refusals
from hotweights.coordinator.config import Config
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.service.coordinator import CoordinatorService
from hotweights.coordinator.service.worker import WorkerService
from hotweights.coordinator.store import open_store
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import fleet_pb2, manifest_pb2, model_pb2, update_pb2, worker_service_pb2
from hotweights.wire.endpoint import Endpoint

DEADLINE_S = 20.0
# A watch goes on for ever: what it would say is looked at this long.
WATCH_S = 0.02
CALLS_A_LIFE = 300
SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"]
METHODS = [method.name for method in SERVICE.methods]
# After the methods: a whole session, a report of the agent that is attached, and one of the replica.
SESSION, AGENT, REPLICA = range(len(METHODS), len(METHODS) + 3)


class Ended(Exception):
    """How `abort` leaves a method."""


class Context:
    """As much of a call's context as the services use."""

    def peer(self) -> str:
        return "ipv4:192.0.2.1:1"

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> NoReturn:
        assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), details
        assert isinstance(details, str)
        raise Ended

    async def send_initial_metadata(self, _: Any) -> None:
        pass

    async def write(self, message: Message) -> None:
        message.SerializeToString()


def context() -> Any:
    return Context()


class Member(Context):
    """An agent or a replica that stays attached, so that updates begin and orders come."""

    def __init__(self, hello: worker_service_pb2.Hello) -> None:
        self._hello = hello
        self._says: asyncio.Queue[worker_service_pb2.SessionRequest] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.order = worker_service_pb2.Order()

    async def say(self, workers: WorkerService, request: worker_service_pb2.SessionRequest) -> None:
        """Attaches first, where the last thing it said ended its session."""
        if self._task is None or self._task.done():
            self._says = asyncio.Queue()
            session: Any = workers.Session
            self._task = asyncio.ensure_future(session(self._requests(), self))
            self._task.add_done_callback(_only_ended)
            self._says.put_nowait(worker_service_pb2.SessionRequest(hello=self._hello))
        self._says.put_nowait(request)
        await asyncio.sleep(0)

    async def _requests(self) -> AsyncIterator[worker_service_pb2.SessionRequest]:
        while True:
            yield await self._says.get()

    async def write(self, message: Message) -> None:
        await super().write(message)
        assert isinstance(message, worker_service_pb2.SessionResponse)
        if message.HasField("order"):
            self.order = message.order

    async def leave(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})


def _only_ended(task: "asyncio.Task[None]") -> None:
    """A session ends with a refusal; anything else is a find, which the next call meets."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, Ended):
        FINDS.append(error)


FINDS: list[BaseException] = []


class _Room:
    """A coordinator without a port, in a loop of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.folder = Path(tempfile.mkdtemp(prefix="hw-fuzz-"))
        self.loop = asyncio.new_event_loop()
        store = open_store(f"sqlite:{self.folder / 'store.db'}", 100)
        self.runtime = Runtime(store, Limits(lease_s=15.0, keep_versions=5))
        config = Config(endpoint=Endpoint(), store="")
        refusals = Refusals(self.runtime.offer, self.runtime.now)
        self.workers = WorkerService(self.runtime, config.heartbeat_s, config.lease_s, refusals)
        self.service = CoordinatorService(self.runtime, "0")
        self.members = {AGENT: Member(HELLOS[0]), REPLICA: Member(HELLOS[1])}
        self.run(self.runtime.start())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, DEADLINE_S))

    async def _leave(self) -> None:
        for member in self.members.values():
            await member.leave()
        await self.runtime.stop()

    def close(self) -> None:
        self.run(self._leave())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)


_room: _Room | None = None


def leave() -> None:
    """Closes what was opened."""
    global _room
    if _room is not None:
        _room.close()
        _room = None


def requests(data: bytes) -> None:
    """Several calls in a row, or one session of several messages."""
    global _room
    if _room is not None and _room.calls >= CALLS_A_LIFE:
        leave()
    if _room is None:
        _room = _Room()
    _room.calls += 1
    _room.run(_calls(_room, data))


async def _calls(here: _Room, data: bytes) -> None:
    cursor = Cursor(data)
    for _ in range(8):
        if cursor.is_done:
            break
        chosen = cursor.number(REPLICA + 1)
        with suppress(DecodeError, Ended):
            if chosen == SESSION:
                await _session(here, cursor)
            elif chosen > SESSION:
                await _report_of(here, here.members[chosen], cursor)
            else:
                await _call(here, METHODS[chosen], cursor.part())
    # What was said is worked in, and the leader lives.
    await here.runtime.ask(e.Ticked(here.runtime.now()), lambda _: b"")
    if FINDS:
        raise FINDS.pop()
    assert here.runtime.failed is not None
    assert not here.runtime.failed.done(), "the leader ended"


async def _report_of(here: _Room, member: Member, cursor: Cursor) -> None:
    """A report of any kind; most are of the order that the member has."""
    is_stray, body = cursor.number(8) == 7, cursor.part()
    report = worker_service_pb2.Report.FromString(body)
    if not is_stray:
        order = member.order
        report.number, report.epoch, report.update_id = order.number, order.epoch, order.update_id
    await member.say(here.workers, worker_service_pb2.SessionRequest(report=report))
    # Orders that follow are heard before the next report.
    await here.runtime.ask(e.Ticked(here.runtime.now()), lambda _: b"")
    await asyncio.sleep(0)


async def _call(here: _Room, name: str, body: bytes) -> None:
    method = getattr(here.service, name)
    if name == "PublishVersion":
        await method(_publication(body), context())
        return
    request = getattr(pb, f"{name}Request").FromString(body)
    answered = method(request, context())
    if not SERVICE.methods_by_name[name].server_streaming:
        (await answered).SerializeToString()
        return
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_read(answered), WATCH_S)


async def _read(answers: AsyncIterator[Message]) -> None:
    async for message in answers:
        message.SerializeToString()


async def _publication(body: bytes) -> AsyncIterator[pb.PublishVersionRequest]:
    """The header's digest is made right, so that what lies behind that check is reached."""
    cursor = Cursor(body)
    header = pb.PublishHeader.FromString(cursor.part())
    blob = cursor.part()
    if cursor.number(8) != 7:
        header.manifest_digest = blake3.blake3(blob).digest()
    yield pb.PublishVersionRequest(header=header)
    yield pb.PublishVersionRequest(page=manifest_pb2.ManifestPage(index=0, count=1, data=blob))


async def _session(here: _Room, cursor: Cursor) -> None:
    async def said() -> AsyncIterator[worker_service_pb2.SessionRequest]:
        hello = HELLOS[cursor.number(len(HELLOS) + 1) - 1]
        if hello is not None:
            yield worker_service_pb2.SessionRequest(hello=hello)
        for _ in range(cursor.number(6)):
            yield worker_service_pb2.SessionRequest.FromString(cursor.part())
            await asyncio.sleep(0)

    await here.workers.Session(said(), context())


def _manifest() -> bytes:
    manifest = manifest_pb2.Manifest(format="safetensors", bucket_bytes=1 << 20)
    manifest.files.add(name="model.safetensors", size_bytes=1000, weights=True)
    manifest.tensors.add(name="a", dtype="BF16", shape=[4, 4], size_bytes=32, digest=b"\7" * 32)
    manifest.buckets.add(size_bytes=1000, digest=b"\1" * 32)
    return manifest.SerializeToString(deterministic=True)


BLOB = _manifest()
DIGEST = blake3.blake3(BLOB).digest()
_AGENT = worker_service_pb2.AgentHello(
    node_id="n", held_digests=[DIGEST], data_endpoint="tcp://192.0.2.1:9", token_key=b"k" * 32
)
_REPLICA = worker_service_pb2.ReplicaHello(
    replica_id="r", model="m", ranks=[fleet_pb2.Rank(index=0, node_id="n", pid=1)], policy=model_pb2.MODEL_POLICY_AUTO
)
# The last stands for whatever the input says.
HELLOS = (
    worker_service_pb2.Hello(incarnation="life", agent=_AGENT),
    worker_service_pb2.Hello(incarnation="life", replica=_REPLICA),
    None,
)


def _asks(name: str, request: Message | None = None, body: bytes = b"") -> bytes:
    return bytes([METHODS.index(name)]) + parts(request.SerializeToString() if request is not None else body)


def _says(hello: int, *messages: worker_service_pb2.SessionRequest) -> bytes:
    return bytes([SESSION, hello + 1, len(messages)]) + parts(*(message.SerializeToString() for message in messages))


def _reports(member: int, **event: Any) -> bytes:
    return bytes([member, 0]) + parts(worker_service_pb2.Report(**event).SerializeToString())


def _publishes(header: pb.PublishHeader, blob: bytes = BLOB) -> bytes:
    return _asks("PublishVersion", body=parts(header.SerializeToString(), blob) + b"\1")


def _report(**event: Any) -> worker_service_pb2.SessionRequest:
    report = worker_service_pb2.Report(number=1, epoch=1, update_id="m.1", **event)
    return worker_service_pb2.SessionRequest(report=report)


def _huge() -> bytes:
    manifest = manifest_pb2.Manifest.FromString(BLOB)
    manifest.files[0].size_bytes = (1 << 64) - 1
    manifest.files.add(name="x.safetensors", size_bytes=(1 << 64) - 1, weights=True)
    return manifest.SerializeToString(deterministic=True)


def _seeds() -> list[bytes]:
    odd = [float("inf"), float("nan"), 1e300, -1.0]
    options = [update_pb2.UpdateOptions(staging_deadline_s=x, apply_deadline_s=x, quiesce_deadline_s=x) for x in odd]
    published = _publishes(pb.PublishHeader(model="m", version="v", start_update=True))
    started = _says(1) + published + _says(0, worker_service_pb2.SessionRequest(), _report(staged={}))
    window = update_pb2.WindowTimes(quiesce_ms=float("nan"), apply_ms=float("inf"), total_ms=-1)
    lines = ["x\0y"] * 9
    routes = fleet_pb2.Routes(direct_modules=(1 << 32) - 1, reload_bytes=(1 << 64) - 1, reasons=lines, sources=lines)
    reports = [
        _report(stage_progress=worker_service_pb2.StageProgress(manifest_digest=DIGEST, bytes_done=(1 << 64) - 1)),
        _report(staged=worker_service_pb2.Staged(manifest_digest=DIGEST)),
        _report(prepared=worker_service_pb2.Prepared(manifest_digest=DIGEST, base_digest=DIGEST, routes=routes)),
        _report(applied=worker_service_pb2.Applied(active_digest=DIGEST, window=window, fingerprints=[b"f"])),
        _report(active_changed=worker_service_pb2.ActiveChanged(active_digest=b"short", note="x\ny")),
    ]
    staged = _reports(AGENT, staged=worker_service_pb2.Staged(manifest_digest=DIGEST))
    prepared = _reports(REPLICA, prepared=worker_service_pb2.Prepared(manifest_digest=DIGEST))
    applied = _reports(REPLICA, applied=worker_service_pb2.Applied(active_digest=DIGEST, window=window))
    torn = worker_service_pb2.ApplyFailed(failure=worker_service_pb2.APPLY_FAILURE_TORN, reason="x\0y", window=window)
    update = published + _reports(AGENT) + _reports(REPLICA) + staged + prepared
    held = worker_service_pb2.ImagesHeld(digests=[DIGEST], stage_bytes_used=(1 << 64) - 1)
    return [
        published,
        update + applied + _asks("GetStatus", pb.GetStatusRequest()),
        update + _reports(REPLICA, apply_failed=torn) + _asks("ListUpdates", pb.ListUpdatesRequest(model="m")),
        update + _asks("CancelUpdate", pb.CancelUpdateRequest(id="m.1")) + applied,
        update + _reports(REPLICA, prepare_failed=worker_service_pb2.PrepareFailed(reason="r" * 3000)),
        started,
        _publishes(pb.PublishHeader(model="m", version="v"), _huge()),
        _says(0, *reports[:3]) + _says(1, *reports[2:5]) + published,
        *(_publishes(pb.PublishHeader(model="m", version="v", start_update=True, options=o)) for o in options),
        *(_asks("StartUpdate", pb.StartUpdateRequest(model="m", options=o)) for o in options),
        *(_asks("PlanUpdate", pb.PlanUpdateRequest(model="m", options=o)) for o in options),
        _asks("StartUpdate", pb.StartUpdateRequest(model="m", options=update_pb2.UpdateOptions(max_failed="9" * 5000))),
        _asks("WatchEvents", pb.WatchEventsRequest(from_revision=1)) + _asks("GetStatus", pb.GetStatusRequest()),
        _asks("WatchEvents", pb.WatchEventsRequest(from_revision=(1 << 64) - 1)),
        _asks("ListVersions", pb.ListVersionsRequest(page_size=(1 << 32) - 1, page_token="9" * 18)),
        _asks("GetManifest", pb.GetManifestRequest(manifest_digest=DIGEST)),
        _asks("CancelUpdate", pb.CancelUpdateRequest(id="m.1")) + _asks("RollBack", pb.RollBackRequest(model="m")),
        _asks("SetModelPolicy", pb.SetModelPolicyRequest(model="m", policy=model_pb2.MODEL_POLICY_AUTO)),
        _asks("ResumeModel", pb.ResumeModelRequest(model="m"))
        + _asks("UndrainReplica", pb.UndrainReplicaRequest(replica_id="r")),
        _says(0, _report(images_held=held), worker_service_pb2.SessionRequest(heartbeat={})),
    ]


TARGETS = {"requests": Target(requests, _seeds, length_max=8192, mutations=600)}
