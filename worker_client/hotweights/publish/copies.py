"""Waiting until enough nodes hold a version."""

import asyncio
import time
from collections.abc import Callable

import grpc

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import model_pb2
from hotweights.wire.access import ANONYMOUS, Access
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Unreachable
from hotweights.wire.problems import call_error

POLL_S = 0.5
CALL_DEADLINE_S = 10.0


class TooFewCopies(Unreachable):
    """The deadline passed first; the version stays as it is, and copies may still come."""

    def __init__(self, version: model_pb2.Version, wanted: int, deadline_s: float) -> None:
        held_by = ", ".join(version.holder_node_ids) or "nobody"
        super().__init__(
            f"{version.model}/{version.name}",
            f"{len(version.holder_node_ids)} of {wanted} copies after {deadline_s:g} s, held by {held_by}",
        )
        self.version = version


async def wait_copies_async(
    endpoint: Endpoint,
    model: str,
    version: str,
    copies: int,
    *,
    deadline_s: float = 600.0,
    progress: Callable[[model_pb2.Version], None] | None = None,
    access: Access = ANONYMOUS,
) -> model_pb2.Version:
    """Returns once `copies` nodes hold the version, verified.

    Raises TooFewCopies at the deadline, Refused when there is no such version. A coordinator that is away is waited
    for.
    """
    ends_at = time.monotonic() + deadline_s
    channel = open_channel(endpoint, access)
    stub = rpc.CoordinatorServiceStub(channel)
    seen = model_pb2.Version(model=model, name=version)
    try:
        while True:
            try:
                response = await stub.GetVersion(
                    pb.GetVersionRequest(model=model, version=version), timeout=CALL_DEADLINE_S
                )
                seen = response.version
                if progress is not None:
                    progress(seen)
            except grpc.aio.AioRpcError as error:
                mapped = call_error(error, endpoint, access)
                if not isinstance(mapped, Unreachable) or time.monotonic() >= ends_at:
                    raise mapped from error
            if len(seen.holder_node_ids) >= copies:
                return seen
            if time.monotonic() >= ends_at:
                raise TooFewCopies(seen, copies, deadline_s)
            await asyncio.sleep(POLL_S)
    finally:
        await channel.close()


def wait_copies(
    endpoint: Endpoint,
    model: str,
    version: str,
    copies: int,
    *,
    deadline_s: float = 600.0,
    access: Access = ANONYMOUS,
) -> model_pb2.Version:
    """As wait_copies_async, where no loop runs."""
    return asyncio.run(wait_copies_async(endpoint, model, version, copies, deadline_s=deadline_s, access=access))
