"""Publishing a checkpoint folder: hashed and served by the node's agent, durable in the coordinator on return."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc

from hotweights.publish.copies import wait_copies_async
from hotweights.v1 import model_pb2, update_pb2
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent_client import connect_or_start
from hotweights.worker_client.config import Config, load_config

Progress = Callable[[int, int], None]


async def publish_folder_async(
    folder: Path,
    *,
    model: str,
    version: str,
    config: Config | None = None,
    start_update: bool = False,
    options: update_pb2.UpdateOptions | None = None,
    include_code: bool = False,
    progress: Progress | None = None,
    request_id: str = "",
    wait_copies: int = 0,
    wait_s: float = 600.0,
) -> model_pb2.Version:
    """Publishes `folder` as `model`/`version`; with `wait_copies`, returns when that many nodes hold it.

    The folder must stay as it is while nodes fetch it: the agent serves it in place. `progress` hears bytes hashed and
    in all. The same `request_id` may be sent again after Unreachable. Raises Refused (reasons VERSION_EXISTS,
    BAD_IMAGE, FOLDER_CHANGED, ...), Unreachable, TooFewCopies.
    """
    config = config or load_config()
    if config.endpoint is None:
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION, "NO_COORDINATOR", "set HOTWEIGHTS_ENDPOINT to the coordinator"
        )
    agent = await connect_or_start(config)
    try:
        published = await agent.publish_folder(
            folder,
            model,
            version,
            start_update=start_update,
            options=options,
            include_code=include_code,
            progress=progress,
            request_id=request_id,
        )
    finally:
        await agent.close()
    if wait_copies:
        published = await wait_copies_async(
            config.endpoint, model, version, wait_copies, deadline_s=wait_s, access=config.access
        )
    return published


def publish_folder(
    folder: Path,
    *,
    model: str,
    version: str,
    config: Config | None = None,
    start_update: bool = False,
    options: update_pb2.UpdateOptions | None = None,
    include_code: bool = False,
    progress: Progress | None = None,
    request_id: str = "",
    wait_copies: int = 0,
    wait_s: float = 600.0,
) -> model_pb2.Version:
    """As publish_folder_async, where no loop runs."""
    return asyncio.run(
        publish_folder_async(
            folder,
            model=model,
            version=version,
            config=config,
            start_update=start_update,
            options=options,
            include_code=include_code,
            progress=progress,
            request_id=request_id,
            wait_copies=wait_copies,
            wait_s=wait_s,
        )
    )
