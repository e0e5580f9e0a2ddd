"""WorkerService: the session of every agent and every replica.

    Hello -> attach (durable, then Welcome) -> orders down, reports up -> left

When a client dies the request iterator just ends, so leaving is noted in `finally`.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator

import anyio
import grpc

from hotweights.coordinator.access.refusals import Refusals
from hotweights.coordinator.hub import Outlet
from hotweights.coordinator.rules import Declined, State
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.records import Ticket
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.service import bounds, convert
from hotweights.coordinator.service.status import Context, abort
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1 import worker_service_pb2_grpc as rpc
from hotweights.wire.errors import Refused
from hotweights.wire.tokens import KEY_BYTES

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 30.0


class WorkerService(rpc.WorkerServiceServicer):
    """One coroutine a stream; the runtime decides."""

    def __init__(self, runtime: Runtime, heartbeat_s: float, lease_s: float, refusals: Refusals) -> None:
        self._runtime = runtime
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._refusals = refusals

    async def Session(self, request_iterator: AsyncIterator[pb.SessionRequest], context: Context) -> None:
        session = str(uuid.uuid4())
        outlet = self._runtime.hub.open(session)
        member = ""
        ended: Declined | Refused
        try:
            hello = await _hello(request_iterator)
            member = hello.agent.node_id or hello.replica.replica_id
            welcome = await self._attach(session, hello)
            await asyncio.wait_for(context.write(pb.SessionResponse(welcome=welcome)), WRITE_DEADLINE_S)
            await self._talk(session, member, outlet, request_iterator, context)
            return
        except (Declined, Refused) as error:
            ended = error
        except (TimeoutError, asyncio.TimeoutError):
            ended = _late("an answer could not be written in time")
        finally:
            self._runtime.hub.close(session)
            if member:
                await self._runtime.put(e.Left(self._runtime.now(), member, session))
        # Last: to a client that does not read, even the status waits.
        await abort(context, ended)

    async def _attach(self, session: str, hello: pb.Hello) -> pb.Welcome:
        if hello.cluster_id not in ("", self._runtime.cluster_id):
            raise _other_cluster(hello.cluster_id, self._runtime.cluster_id)
        event = _attached(self._runtime.now(), session, hello)

        def answer(state: State) -> bytes:
            seat = state.seats.get(hello.replica.replica_id)
            return (seat.model if seat is not None else "").encode()

        model = await self._runtime.ask(event, answer)
        return pb.Welcome(
            session_id=session,
            cluster_id=self._runtime.cluster_id,
            epoch=self._runtime.state.epoch,
            revision=self._runtime.revision,
            model=model.decode(),
            heartbeat_s=self._heartbeat_s,
            lease_s=self._lease_s,
        )

    async def _talk(
        self,
        session: str,
        member: str,
        outlet: Outlet,
        requests: AsyncIterator[pb.SessionRequest],
        context: Context,
    ) -> None:
        """Until the member leaves, its outlet ends, or it reads too slowly."""
        hears = asyncio.create_task(self._hear(session, member, requests))
        speaks = asyncio.create_task(_speak(outlet, context))
        ends = asyncio.create_task(outlet.ended.wait())
        tasks = {hears, speaks, ends}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in (hears, speaks):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if outlet.ended.is_set():
            raise Refused(grpc.StatusCode.UNAVAILABLE, "SESSION_ENDED", outlet.reason)

    async def _hear(self, session: str, member: str, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for request in requests:
            if request.report.HasField("peer_refused"):
                self._refusals.note_at(member, request.report.peer_refused.refusal)
            event = _event(self._runtime, session, member, request)
            if event is not None:
                await self._runtime.put(event)


async def _speak(outlet: Outlet, context: Context) -> None:
    while True:
        order = await outlet.queue.get()
        # Not asyncio.wait_for: up to Python 3.11 it loses a cancel that meets the end of the write.
        with anyio.fail_after(WRITE_DEADLINE_S):
            await context.write(pb.SessionResponse(order=order))


async def _hello(requests: AsyncIterator[pb.SessionRequest]) -> pb.Hello:
    try:
        first = await asyncio.wait_for(anext(requests), HELLO_DEADLINE_S)
    except StopAsyncIteration:
        raise bounds.bad_hello("the stream ended before a Hello") from None
    except asyncio.TimeoutError:
        raise _late("no Hello came in time") from None
    if first.WhichOneof("message") != "hello":
        raise bounds.bad_hello("the first message of a session is a Hello")
    hello = first.hello
    if not hello.incarnation or not (hello.agent.node_id or hello.replica.replica_id):
        raise bounds.bad_hello("a Hello says its incarnation and the id of its node or replica")
    bounds.checked_id(hello.incarnation, "an incarnation")
    bounds.checked_id(hello.cluster_id, "a cluster's id")
    return hello


def _other_cluster(known: str, ours: str) -> Refused:
    """Epochs compare only within a cluster, so a member must not slip from one to another."""
    return Refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        "OTHER_CLUSTER",
        f"this coordinator is of cluster {ours}, not {known}: its store was replaced; restart the member, "
        "or set HOTWEIGHTS_ADOPT_CLUSTER=1",
    )


def _late(message: str) -> Refused:
    return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "TOO_SLOW", message)


def _attached(now: float, session: str, hello: pb.Hello) -> e.Event:
    if hello.WhichOneof("member") == "agent":
        agent = hello.agent
        if len(agent.token_key) not in (0, KEY_BYTES):
            raise bounds.bad_hello(f"a token key has {KEY_BYTES} bytes, this one {len(agent.token_key)}")
        return e.AgentAttached(
            now=now,
            node=agent.node_id,
            session=session,
            incarnation=hello.incarnation,
            endpoint=bounds.checked_endpoint(agent.data_endpoint),
            held=bounds.digests(agent.held_digests),
            token_key=agent.token_key,
            bytes_used=agent.stage_bytes_used,
            bytes_free=agent.stage_bytes_free,
            zone=bounds.text(agent.zone),
        )
    replica = hello.replica
    return e.ReplicaAttached(
        now=now,
        replica=replica.replica_id,
        session=session,
        incarnation=hello.incarnation,
        model=replica.model,
        policy=convert.policy_from(replica.policy),
        ranks=bounds.ranks(replica.ranks),
        active=bounds.digest(replica.active_digest),
        identifying=replica.identifying,
        open_window=bounds.checked_id(replica.open_window, "an open window"),
        engine=bounds.text(replica.engine, bounds.ENGINE_LENGTH_MAX),
        fingerprints=bounds.fingerprints(replica.fingerprints),
        fingerprint_kind=bounds.fingerprint_kind(replica.fingerprint_kind),
    )


def _event(runtime: Runtime, session: str, member: str, request: pb.SessionRequest) -> e.Event | None:
    who = (runtime.now(), member, session)
    match request.WhichOneof("message"):
        case "answer" if request.answer.refusal:
            answer = request.answer
            return e.OrderRefused(
                *who, answer.update_id, Ticket(answer.epoch, answer.number), bounds.text(answer.refusal)
            )
        case "report":
            return _report(who, request.report)
        case "heartbeat" | "answer":
            return e.Beat(*who)
        case _:
            return None


def _report(who: tuple[float, str, str], report: pb.Report) -> e.Event | None:
    ticket, update = Ticket(report.epoch, report.number), report.update_id
    match report.WhichOneof("event"):
        case "stage_progress":
            progress = report.stage_progress
            digest = bounds.digest(progress.manifest_digest)
            source = bounds.text(progress.source_node_id)
            rate = progress.bytes_per_s if math.isfinite(progress.bytes_per_s) else 0.0
            moved, way = (progress.bytes_done, progress.bytes_total), bounds.text(progress.transport)
            return e.StageProgressed(*who, update, digest, *moved, source, rate, progress.wire_bytes, way)
        case "source_left":
            left = report.source_left
            digest, source = bounds.digest(left.manifest_digest), bounds.text(left.source_node_id)
            return e.SourceLeft(*who, update, digest, source, bounds.text(left.reason), left.lied)
        case "staged":
            return e.Staged(*who, update, bounds.digest(report.staged.manifest_digest))
        case "stage_failed":
            failed = report.stage_failed
            return e.StageFailed(*who, update, bounds.digest(failed.manifest_digest), bounds.text(failed.reason))
        case "images_held":
            held = report.images_held
            return e.HeldChanged(*who, bounds.digests(held.digests), held.stage_bytes_used, held.stage_bytes_free)
        case _:
            return _replica_report(who, ticket, report)


def _replica_report(who: tuple[float, str, str], ticket: Ticket, report: pb.Report) -> e.Event | None:
    update = report.update_id
    match report.WhichOneof("event"):
        case "prepared":
            prepared = report.prepared
            routes = convert.routes_from(prepared.routes) if prepared.HasField("routes") else None
            return e.Prepared(*who, update, ticket, bounds.digest(prepared.base_digest), routes)
        case "prepare_failed":
            return e.PrepareFailed(*who, update, ticket, bounds.text(report.prepare_failed.reason))
        case "applied":
            applied = report.applied
            return e.Applied(
                *who,
                update,
                ticket,
                bounds.digest(applied.active_digest),
                convert.window_from(applied.window),
                bounds.fingerprints(applied.fingerprints),
                bounds.text(applied.note),
            )
        case "deferred":
            return e.Deferred(*who, update, ticket, bounds.text(report.deferred.reason))
        case "apply_failed":
            failed = report.apply_failed
            return e.ApplyFailed(
                *who,
                update,
                ticket,
                bounds.text(failed.reason),
                bounds.digest(failed.active_digest),
                torn=failed.failure == pb.APPLY_FAILURE_TORN,
                window=convert.window_from(failed.window),
            )
        case "active_changed":
            changed = report.active_changed
            return e.ActiveChanged(
                *who,
                bounds.digest(changed.active_digest),
                bounds.fingerprints(changed.fingerprints),
                bounds.text(changed.note),
            )
        case _:
            return e.Beat(*who)
