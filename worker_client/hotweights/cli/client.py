"""The coordinator as the commands see it: every call with a deadline, every change with a request id."""

import argparse
import uuid
from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from hotweights.cli.config import client_settings
from hotweights.cli.errors import CommandFailed
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import fleet_pb2
from hotweights.wire.channel import open_channel
from hotweights.wire.errors import HotweightsError, Unreachable
from hotweights.wire.problems import call_error
from hotweights.worker_client.config import Config

M = TypeVar("M", bound=Message)

MANIFEST_DEADLINE_S = 120.0
# A watch is opened anew after this, so that it too has a deadline.
WATCH_DEADLINE_S = 600.0
PAGES_MAX = 1000


class Coordinator:
    """CoordinatorService at the endpoint of the settings. Raises Refused and Unreachable."""

    def __init__(self, settings: Config, deadline_s: float) -> None:
        assert settings.endpoint is not None, "read_settings sets it"
        self.settings = settings
        self.endpoint = settings.endpoint
        self._deadline_s = deadline_s
        self._channel = open_channel(settings.endpoint, settings.access)
        self._stub = rpc.CoordinatorServiceStub(self._channel)

    async def __aenter__(self) -> "Coordinator":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, request: Message, answer: type[M]) -> M:
        """One call: the one that `request` is named for. A change gets a request id of its own."""
        is_change = "request_id" in request.DESCRIPTOR.fields_by_name
        if is_change:
            setattr(request, "request_id", str(uuid.uuid4()))  # noqa: B010 - which message it is, is not known here
        method = getattr(self._stub, type(request).__name__.removesuffix("Request"))
        try:
            response = await method(request, timeout=self._deadline_s)
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error, is_change=is_change) from error
        assert isinstance(response, answer)
        return response

    async def status(self, model: str = "", event_count: int = 1) -> pb.GetStatusResponse:
        return await self.ask(pb.GetStatusRequest(model=model, event_count=event_count), pb.GetStatusResponse)

    async def manifest(self, digest: bytes) -> bytes:
        """The serialised manifest that `digest` names. Raises BadImage too."""
        from hotweights.worker_client.image import join_pages

        request = pb.GetManifestRequest(manifest_digest=digest)
        pages = []
        try:
            async for response in self._stub.GetManifest(request, timeout=MANIFEST_DEADLINE_S):
                pages.append(response.page)
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error) from error
        return join_pages(pages, digest)

    async def events(self, from_revision: int) -> AsyncGenerator[fleet_pb2.Event, None]:
        """Events from a revision on, as they come; raises Unreachable at the latest after WATCH_DEADLINE_S."""
        request = pb.WatchEventsRequest(from_revision=from_revision)
        try:
            async for response in self._stub.WatchEvents(request, timeout=WATCH_DEADLINE_S):
                for event in response.events:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error) from error

    def _mapped(self, error: grpc.aio.AioRpcError, *, is_change: bool = False) -> HotweightsError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            unknown = "; whether the change took effect is unknown" if is_change else ""
            return Unreachable(f"coordinator {self.endpoint}", f"no answer within {self._deadline_s:g} s{unknown}")
        return call_error(error, self.endpoint, self.settings.access)


def connect(arguments: argparse.Namespace) -> Coordinator:
    """For `async with`. Raises BadSetting, BadEndpoint, BadAccess and CommandFailed."""
    return Coordinator(client_settings(arguments), arguments.timeout)


async def chosen_model(coordinator: Coordinator, arguments: argparse.Namespace) -> str:
    """--model, HOTWEIGHTS_MODEL, or the only one there is. Raises CommandFailed with a list of them."""
    named: str = arguments.model or coordinator.settings.model
    if named:
        return named
    models = [model.name for model in (await coordinator.status()).models]
    if len(models) == 1:
        return models[0]
    if not models:
        raise CommandFailed(f"coordinator {coordinator.endpoint} has no model yet; name one with --model")
    raise CommandFailed(f"which model? name one with --model or HOTWEIGHTS_MODEL: {', '.join(models)}")
