"""CoordinatorService: what publishers, operators and monitors ask."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import blake3
from google.protobuf.message import DecodeError, Message

from hotweights.coordinator.access.gate import Gate
from hotweights.coordinator.access.roles import START_UPDATE
from hotweights.coordinator.planner import add_unchanged, plan_update, unchanged_bytes
from hotweights.coordinator.rules import Declined, State
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules.catalogue import version_named
from hotweights.coordinator.rules.records import Kind, UpdateRecord
from hotweights.coordinator.rules.turn import Turn
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.service import convert
from hotweights.coordinator.service.status import Context, streaming, unary
from hotweights.coordinator.store import Compacted
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import fleet_pb2, manifest_pb2, update_pb2
from hotweights.wire.channel import MANIFEST_BYTES_MAX, MESSAGE_BYTES_MAX, PAGE_BYTES_MAX

M = TypeVar("M", bound=Message)
T = TypeVar("T")

# 600 s for the largest manifest are half a megabyte a second.
PAGE_DEADLINE_S, PUBLICATION_DEADLINE_S = 60.0, 600.0
LIST_SIZE, LIST_SIZE_MAX = 100, 1000
PAGE_TOKEN_LENGTH_MAX = 18
# Half of what a message may have. An item that is larger comes alone.
LIST_BYTES_MAX = MESSAGE_BYTES_MAX // 2
# What a manifest says is not believed: beyond 64 bits no answer could carry the sum, and no update plan its parts.
IMAGE_BYTES_MAX = 1 << 50
# The store counts in signed 64 bits.
REVISION_MAX = 1 << 62
WATCH_BATCH = 500
WATCH_WAIT_S = 30.0
STATUS_EVENTS, STATUS_EVENTS_MAX = 10, 100
STATUS_VERSIONS = 10


class CoordinatorService(rpc.CoordinatorServiceServicer):
    """Reads come from the runtime's state; changes are asked of it."""

    def __init__(self, runtime: Runtime, software_version: str, gate: Gate | None = None) -> None:
        """Without a gate everyone may do everything."""
        self._runtime = runtime
        self._gate = gate
        self._software_version = software_version

    async def _change(
        self,
        event: e.Event,
        request: Any,
        answer: Callable[[State], M],
        kind: type[M],
        manifests: dict[str, bytes] | None = None,
    ) -> M:
        """One durable change; the same request_id and payload get the first answer again."""
        key = ""
        if request.request_id:
            digest = hashlib.sha256(request.SerializeToString(deterministic=True))
            key = f"{type(request).__name__} {digest.hexdigest()}"
        data = await self._runtime.ask(
            event,
            lambda state: answer(state).SerializeToString(),
            key=key,
            manifests=manifests,
        )
        return kind.FromString(data)

    # Versions.

    @unary
    async def PublishVersion(
        self, request_iterator: AsyncIterator[pb.PublishVersionRequest], context: Context
    ) -> pb.PublishVersionResponse:
        header, blob = await _read_publication(request_iterator)
        if header.start_update and self._gate is not None:
            self._gate.require(START_UPDATE, context)
        manifest, digest = _checked_manifest(header, blob)
        existed = (header.model, header.version) in self._runtime.state.versions
        event = e.VersionPublished(
            now=self._runtime.now(),
            model=header.model,
            name=header.version,
            digest=digest,
            image_bytes=sum(file.size_bytes for file in manifest.files),
            tensor_count=len(manifest.tensors),
            bucket_count=len(manifest.buckets),
            start=header.start_update,
            options=convert.options_from(header.options),
        )

        def answer(state: State) -> pb.PublishVersionResponse:
            version = state.versions[header.model, header.version]
            return pb.PublishVersionResponse(version=convert.version_message(state, version), existed=existed)

        return await self._change(event, header, answer, pb.PublishVersionResponse, {digest: blob})

    @unary
    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.GetVersionResponse:
        state = self._runtime.state
        version = version_named(Turn(state, 0.0), request.model, request.version)
        return pb.GetVersionResponse(version=convert.version_message(state, version))

    @unary
    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        state = self._runtime.state
        versions = sorted(
            (v for v in state.versions.values() if request.model in ("", v.model)),
            key=lambda v: (-v.published_at, v.model, -v.sequence),
        )
        shown, token = _page(versions, request, lambda v: convert.version_message(state, v))
        return pb.ListVersionsResponse(versions=shown, next_page_token=token)

    @unary
    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: Context) -> pb.DeleteVersionResponse:
        event = e.VersionDeleted(self._runtime.now(), request.model, request.version)
        return await self._change(event, request, lambda _: pb.DeleteVersionResponse(), pb.DeleteVersionResponse)

    @streaming
    async def GetManifest(
        self, request: pb.GetManifestRequest, context: Context
    ) -> AsyncIterator[pb.GetManifestResponse]:
        digest = request.manifest_digest.hex()
        blob = await self._runtime.manifest(digest)
        if blob is None:
            raise Declined("NOT_FOUND", "MANIFEST_UNKNOWN", f"no version has the digest {digest or '(empty)'}")
        count = -(-len(blob) // PAGE_BYTES_MAX)
        for index in range(count):
            data = blob[index * PAGE_BYTES_MAX : (index + 1) * PAGE_BYTES_MAX]
            page = manifest_pb2.ManifestPage(index=index, count=count, data=data)
            yield pb.GetManifestResponse(page=page)

    # Updates.

    @unary
    async def StartUpdate(self, request: pb.StartUpdateRequest, context: Context) -> pb.StartUpdateResponse:
        event = e.UpdateAsked(
            self._runtime.now(),
            request.model,
            request.version,
            convert.options_from(request.options),
        )

        def answer(state: State) -> pb.StartUpdateResponse:
            update = _newest_update(state, request.model)
            return pb.StartUpdateResponse(update=convert.update_message(state, update))

        return await self._change(event, request, answer, pb.StartUpdateResponse)

    @unary
    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        event = e.UpdateAsked(
            self._runtime.now(),
            request.model,
            request.version,
            convert.options_from(request.options),
            Kind.ROLLBACK,
        )

        def answer(state: State) -> pb.RollBackResponse:
            update = _newest_update(state, request.model)
            return pb.RollBackResponse(update=convert.update_message(state, update))

        return await self._change(event, request, answer, pb.RollBackResponse)

    @unary
    async def GetUpdate(self, request: pb.GetUpdateRequest, context: Context) -> pb.GetUpdateResponse:
        state = self._runtime.state
        return pb.GetUpdateResponse(update=convert.update_message(state, _update_named(state, request.id)))

    @unary
    async def ListUpdates(self, request: pb.ListUpdatesRequest, context: Context) -> pb.ListUpdatesResponse:
        state = self._runtime.state
        updates = sorted(
            (u for u in state.updates.values() if request.model in ("", u.model)),
            key=lambda u: (-u.started_at, u.id),
        )
        shown, token = _page(updates, request, lambda u: convert.update_message(state, u))
        return pb.ListUpdatesResponse(updates=shown, next_page_token=token)

    @unary
    async def CancelUpdate(self, request: pb.CancelUpdateRequest, context: Context) -> pb.CancelUpdateResponse:
        def answer(state: State) -> pb.CancelUpdateResponse:
            update = _update_named(state, request.id)
            return pb.CancelUpdateResponse(update=convert.update_message(state, update))

        event = e.CancelAsked(self._runtime.now(), request.id)
        return await self._change(event, request, answer, pb.CancelUpdateResponse)

    @unary
    async def PlanUpdate(self, request: pb.PlanUpdateRequest, context: Context) -> pb.PlanUpdateResponse:
        plan = plan_update(
            self._runtime.state,
            self._runtime.now(),
            request.model,
            request.version,
            convert.options_from(request.options),
        )
        await self._compare(plan)
        return pb.PlanUpdateResponse(plan=plan)

    async def _compare(self, plan: update_pb2.Plan) -> None:
        """Adds to a plan what the nodes that have its base need not fetch."""
        versions = self._runtime.state.versions
        digests = [
            version.digest if (version := versions.get((plan.model, name))) is not None else ""
            for name in (plan.target_version, plan.base_version)
        ]
        blobs = [await self._runtime.manifest(digest) if digest else None for digest in digests]
        if None not in blobs:
            found = [blob for blob in blobs if blob is not None]
            add_unchanged(self._runtime.state, plan, digests[1], await asyncio.to_thread(unchanged_bytes, *found))

    # Policies.

    @unary
    async def SetModelPolicy(self, request: pb.SetModelPolicyRequest, context: Context) -> pb.SetModelPolicyResponse:
        policy = convert.policy_from(request.policy)
        if policy is None:
            raise Declined("INVALID_ARGUMENT", "POLICY_MISSING", "policy is manual or auto")

        def answer(state: State) -> pb.SetModelPolicyResponse:
            model = convert.model_message(state, state.models[request.model])
            return pb.SetModelPolicyResponse(model=model)

        event = e.PolicySet(self._runtime.now(), request.model, policy)
        return await self._change(event, request, answer, pb.SetModelPolicyResponse)

    @unary
    async def ResumeModel(self, request: pb.ResumeModelRequest, context: Context) -> pb.ResumeModelResponse:
        def answer(state: State) -> pb.ResumeModelResponse:
            model = convert.model_message(state, state.models[request.model])
            return pb.ResumeModelResponse(model=model)

        event = e.ModelResumed(self._runtime.now(), request.model)
        return await self._change(event, request, answer, pb.ResumeModelResponse)

    @unary
    async def UndrainReplica(self, request: pb.UndrainReplicaRequest, context: Context) -> pb.UndrainReplicaResponse:
        def answer(state: State) -> pb.UndrainReplicaResponse:
            record = state.replicas[request.replica_id]
            return pb.UndrainReplicaResponse(replica=convert.replica_message(state, record))

        event = e.ReplicaUndrained(self._runtime.now(), request.replica_id)
        return await self._change(event, request, answer, pb.UndrainReplicaResponse)

    # Looking.

    @unary
    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        state, model = self._runtime.state, request.model
        if model and model not in state.models:
            version_named(Turn(state, 0.0), model, "")
        models = sorted(m.name for m in state.models.values() if model in ("", m.name))
        response = pb.GetStatusResponse(
            cluster_id=self._runtime.cluster_id,
            epoch=state.epoch,
            revision=self._runtime.revision,
            software_version=self._software_version,
            models=[convert.model_message(state, state.models[name]) for name in models],
            nodes=[convert.node_message(state.nodes[name]) for name in sorted(state.nodes)],
            replicas=[
                convert.replica_message(state, state.replicas[name])
                for name in sorted(state.replicas)
                if model in ("", state.replicas[name].model)
            ],
        )
        for name in models:
            _add_model(response, state, name)
        count = min(request.event_count or STATUS_EVENTS, STATUS_EVENTS_MAX)
        events = [fleet_pb2.Event.FromString(data) for data in self._runtime.recent]
        shown = [event for event in events if model in ("", event.model)][-count:]
        response.events.extend(shown)
        if response.ByteSize() > MESSAGE_BYTES_MAX:
            raise Declined(
                "RESOURCE_EXHAUSTED",
                "STATUS_TOO_LARGE",
                f"the fleet's status has {response.ByteSize()} bytes, more than one answer takes: ask for one model, "
                "or for ListNodes, ListReplicas and ListUpdates, which answer in pages",
            )
        return response

    @unary
    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        state = self._runtime.state
        names = sorted(x.id for x in state.replicas.values() if request.model in ("", x.model))
        shown, token = _page(names, request, lambda name: convert.replica_message(state, state.replicas[name]))
        return pb.ListReplicasResponse(replicas=shown, next_page_token=token)

    @unary
    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        state = self._runtime.state
        shown, token = _page(sorted(state.nodes), request, lambda name: convert.node_message(state.nodes[name]))
        return pb.ListNodesResponse(nodes=shown, next_page_token=token)

    @streaming
    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        at = min(request.from_revision, REVISION_MAX) or self._runtime.revision + 1
        # Who asked for what is new knows by this that nothing from now on is missed.
        await context.send_initial_metadata(())
        while True:
            try:
                entries = await self._runtime.events_from(at, WATCH_BATCH)
            except Compacted as error:
                raise Declined(
                    "OUT_OF_RANGE",
                    "REVISION_COMPACTED",
                    f"revision {at} is no longer kept; the first is {error.first}",
                    first_revision=str(error.first),
                ) from error
            if entries:
                at = entries[-1][0] + 1
                events = [fleet_pb2.Event.FromString(payload) for _, payload in entries]
                for wanted in _portions(event for event in events if request.model in ("", event.model)):
                    yield pb.WatchEventsResponse(events=wanted)
            else:
                await self._runtime.grown_past(at - 1, WATCH_WAIT_S)


async def _read_publication(
    parts: AsyncIterator[pb.PublishVersionRequest],
) -> tuple[pb.PublishHeader, bytes]:
    """Header and manifest of a PublishVersion stream, bounded in pages, size and time."""
    due = time.monotonic() + PUBLICATION_DEADLINE_S
    first = await _next_part(parts, due)
    if first is None or first.WhichOneof("part") != "header":
        raise _bad_publication("one header comes first, then the manifest's pages in order")
    pages: list[bytes] = []
    count = 0
    while (part := await _next_part(parts, due)) is not None:
        if part.WhichOneof("part") != "page" or part.page.index != len(pages):
            raise _bad_publication("one header comes first, then the manifest's pages in order")
        count = count or part.page.count
        _check_page(part.page, count)
        pages.append(part.page.data)
    if len(pages) != count:
        raise _bad_publication(f"{len(pages)} of {count} manifest pages came")
    return first.header, b"".join(pages)


async def _next_part(parts: AsyncIterator[pb.PublishVersionRequest], due: float) -> pb.PublishVersionRequest | None:
    """None at the stream's end. Raises Declined for one that takes too long."""
    try:
        return await asyncio.wait_for(anext(parts, None), min(PAGE_DEADLINE_S, due - time.monotonic()))
    except asyncio.TimeoutError as error:
        raise _bad_publication("the next page did not come in time") from error


def _check_page(page: manifest_pb2.ManifestPage, count: int) -> None:
    """Raises Declined for a page that no manifest of `count` pages has."""
    if page.count != count or not 0 < count <= MANIFEST_BYTES_MAX // PAGE_BYTES_MAX or page.index >= count:
        raise _bad_publication(
            f"page {page.index} says there are {page.count} pages; a manifest is no larger than {MANIFEST_BYTES_MAX} "
            f"bytes, in pages of {PAGE_BYTES_MAX}, all with the same count"
        )
    if not 0 < len(page.data) <= PAGE_BYTES_MAX:
        raise _bad_publication(f"page {page.index} has {len(page.data)} bytes, a page has 1 to {PAGE_BYTES_MAX}")


def _bad_publication(message: str) -> Declined:
    return Declined("INVALID_ARGUMENT", "BAD_PUBLICATION", message)


def _checked_manifest(header: pb.PublishHeader, blob: bytes) -> tuple[manifest_pb2.Manifest, str]:
    digest = blake3.blake3(blob).digest()
    if digest != header.manifest_digest:
        raise _bad_publication("the manifest's bytes do not have the digest in the header")
    try:
        manifest = manifest_pb2.Manifest.FromString(blob)
    except DecodeError as error:
        raise _bad_publication(f"the manifest cannot be read: {error}") from error
    if not manifest.tensors or not manifest.buckets or not manifest.files:
        raise _bad_publication("the manifest names no tensors")
    size_bytes = sum(file.size_bytes for file in manifest.files)
    if size_bytes > IMAGE_BYTES_MAX:
        raise _bad_publication(f"its files are said to have {size_bytes} bytes, more than any image")
    return manifest, digest.hex()


def _page(items: Sequence[T], request: Any, message_of: Callable[[T], M]) -> tuple[list[M], str]:
    """A page of a list, bounded in items and bytes; the token is the place where the next one starts."""
    token = request.page_token
    if token and not (token.isascii() and token.isdigit() and len(token) <= PAGE_TOKEN_LENGTH_MAX):
        raise Declined("INVALID_ARGUMENT", "BAD_PAGE_TOKEN", f"{token[:40]!r} is no page token")
    start = int(token or 0)
    size = min(request.page_size or LIST_SIZE, LIST_SIZE_MAX)
    shown = next(_portions(map(message_of, items[start : start + size])), [])
    end = start + len(shown)
    return shown, str(end) if shown and end < len(items) else ""


def _portions(messages: Iterable[M]) -> Iterator[list[M]]:
    """The messages in lists of up to LIST_BYTES_MAX, or of one."""
    portion: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if portion and size > LIST_BYTES_MAX:
            yield portion
            portion, size = [], message.ByteSize()
        portion.append(message)
    if portion:
        yield portion


def _newest_update(state: State, model: str) -> UpdateRecord:
    updates = [u for u in state.updates.values() if u.model == model and u.kind is not Kind.CATCH_UP]
    return max(updates, key=lambda u: (u.started_at, u.id))


def _update_named(state: State, update_id: str) -> UpdateRecord:
    update = state.updates.get(update_id)
    if update is None:
        raise Declined("NOT_FOUND", "UPDATE_UNKNOWN", f"there is no update {update_id!r}")
    return update


def _add_model(response: pb.GetStatusResponse, state: State, name: str) -> None:
    """A model's newest versions, its open updates and the last one that ended."""
    versions = sorted((v for v in state.versions.values() if v.model == name), key=lambda v: -v.sequence)
    for version in versions[:STATUS_VERSIONS]:
        response.versions.append(convert.version_message(state, version))
    updates = [u for u in state.updates.values() if u.model == name]
    ended = [u for u in updates if not u.phase.is_open]
    shown = [u for u in updates if u.phase.is_open]
    if ended:
        shown.append(max(ended, key=lambda u: (u.ended_at, u.id)))
    for update in shown:
        response.updates.append(convert.update_message(state, update))
