"""The newest version of a model, mapped on this node: what `apply_update` without a folder installs.

coordinator --ListVersions--> digest --> agent (stage, map) --> folder
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import model_pb2
from hotweights.wire.channel import open_channel
from hotweights.wire.errors import Refused
from hotweights.wire.problems import call_error
from hotweights.worker_client.config import Config

CALL_DEADLINE_S = 10.0
T = TypeVar("T")


@dataclass(frozen=True)
class Pulled:
    """A version and what installing it gave."""

    version: str
    digest: bytes
    fingerprint: bytes


async def pull_newest(config: Config, write: Callable[[Path], bytes]) -> Pulled:
    """Has the agent stage and map the newest version, and calls `write` with its folder.

    Raises Refused (no coordinator set, no such model, no version), Unreachable, and what `write` raises.
    """
    version = await newest_version(config)
    from hotweights.worker_client.agent_client import connect_or_start

    agent = await connect_or_start(config)
    try:
        await agent.stage(version.manifest_digest)
        # Blocks this loop, which is private to the call and has nothing else to do. Closing unpins.
        proof = write(await agent.map_image(version.manifest_digest, f"{config.node}-{os.getpid()}"))
    finally:
        await agent.close()
    return Pulled(version.name, version.manifest_digest, proof)


async def newest_version(config: Config) -> model_pb2.Version:
    """The newest version that a node holds. Raises Refused, Unreachable."""
    if config.endpoint is None:
        raise _refused("NO_COORDINATOR", "no coordinator: give endpoint= or set HOTWEIGHTS_ENDPOINT")
    try:
        async with open_channel(config.endpoint, config.access) as channel:
            stub: Any = rpc.CoordinatorServiceStub(channel)
            model = config.model or await _only_model(stub, str(config.endpoint))
            answer = await stub.ListVersions(pb.ListVersionsRequest(model=model), timeout=CALL_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        raise call_error(error, config.endpoint, config.access) from error
    for version in answer.versions:
        if version.state == model_pb2.VERSION_STATE_AVAILABLE:
            found: model_pb2.Version = version
            return found
    raise _refused("NO_VERSION", f"model {model} has no version that any node holds")


async def _only_model(stub: Any, endpoint: str) -> str:
    status = await stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_DEADLINE_S)
    names = sorted(model.name for model in status.models)
    if len(names) == 1:
        return str(names[0])
    listed = ", ".join(names) or "none"
    raise _refused("WHICH_MODEL", f"say which model: {endpoint} has {listed} (model= or HOTWEIGHTS_MODEL)")


def _refused(reason: str, message: str) -> Refused:
    return Refused(grpc.StatusCode.FAILED_PRECONDITION, reason, message)
