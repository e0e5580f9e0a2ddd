"""The agent's process: lock, stage, data port, socket; SIGTERM and idleness end it in good order.

lock beside the socket -> stage -> data port, session -> service behind the door -> until told or idle
"""

import asyncio
import dataclasses
import logging
import logging.handlers
import os
import signal
import time
from pathlib import Path

import grpc

from hotweights.transports import mpi_lane, ucx_lane
from hotweights.v1 import agent_service_pb2_grpc as rpc
from hotweights.wire import failpoints
from hotweights.wire.channel import server_options
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.agent.agent import Agent
from hotweights.worker_client.agent.door import Door
from hotweights.worker_client.agent.locks import check_socket_path, is_lost, lock_socket
from hotweights.worker_client.agent.peers import parse_allow
from hotweights.worker_client.agent.service import AgentServicer
from hotweights.worker_client.config import Config
from hotweights.worker_client.stage.room import small_pages
from hotweights.worker_client.stage.stage import Stage, safe_folder

log = logging.getLogger(__name__)

LOG_NAME = "agent.log"
LOG_BYTES_MAX = 4 << 20
LOGS_KEPT = 2
GRACE_S = 2.0
LOCK_WAIT_S = 5.0


def run_agent(config: Config, *, started_by_client: bool) -> None:
    """Runs the node's agent until SIGTERM, SIGINT or, `started_by_client`, until nobody needs it.

    Raises AgentRuns, StageTaken, StageUnsafe; OSError and ValueError for addresses that cannot be.
    """
    failpoints.arm(config.failpoints)
    if started_by_client:
        config = _without_its_starters(config)
    os.nice(max(0, config.nice - os.nice(0)))  # not more than that, where it was started with some
    try:
        asyncio.run(serve_agent(config, started_by_client=started_by_client))
    finally:
        mpi_lane.close_lane()
        ucx_lane.close_lane()


def _without_its_starters(config: Config) -> Config:
    """What an agent may not take from the process of a client that started it: its place in a job, its GPUs."""
    transport = "tcp" if config.transport == "mpi" else config.transport
    return dataclasses.replace(config, transport=transport, lend_gpus=())


async def serve_agent(
    config: Config,
    *,
    started_by_client: bool,
    quota_bytes: int | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """As run_agent, on a loop that runs. `stop` ends it too; `quota_bytes` bounds the stage."""
    stop = stop or asyncio.Event()
    check_socket_path(config.agent_socket)
    safe_folder(config.stage_dir, in_pod=config.in_kubernetes)  # before the lock, which may lie in it
    lock = await lock_socket(config.agent_socket, LOCK_WAIT_S if started_by_client else 0.0)
    stage = Stage(config.stage_dir, max_images=config.max_images, quota_bytes=quota_bytes)
    try:
        found = await asyncio.to_thread(stage.open)
        handler = _log_to(config.stage_dir / LOG_NAME)
        if small := small_pages(config.stage_dir):
            log.info("%s has small pages: mounted with huge=within_size it takes images with less work", small)
        try:
            await _serve(config, stage, found, stop, lock if started_by_client else None)
        finally:
            logging.getLogger("hotweights").removeHandler(handler)
            handler.close()
    finally:
        stage.close()
        os.close(lock)


async def _serve(config: Config, stage: Stage, found: list[bytes], stop: asyncio.Event, lock: int | None) -> None:
    """Where a `lock` is given, until nobody needs it."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    agent = Agent(config, stage)
    door = Door(config.agent_socket, parse_allow(config.agent_allow), agent.note_refused)
    server = grpc.aio.server(options=server_options())
    rpc.add_AgentServiceServicer_to_server(AgentServicer(agent), server)
    try:
        await agent.start(found)
        door.prepare()
        server.add_insecure_port(Endpoint(path=str(door.inner)).target)
        await server.start()
        await door.open()
        log.info("agent %d of node %s listens at %s", os.getpid(), config.node, config.agent_socket)
        await _until_over(agent, stop, lock)
    finally:
        door.stop_listening()
        agent.lending.close()
        await server.stop(GRACE_S)
        await agent.close()
        await door.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("agent %d ended", os.getpid())


async def _until_over(agent: Agent, stop: asyncio.Event, lock: int | None) -> None:
    """Until told to stop, until a part of the agent died (raised), or until nobody has needed it for long enough."""
    look_every_s = max(0.1, min(10.0, agent.config.agent_idle_s / 4))
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), look_every_s)
        except asyncio.TimeoutError:
            if (error := agent.failed()) is not None:
                raise error from None
            if lock is not None and not await _is_needed(agent, lock):
                log.info("nobody has needed this agent for %g s", agent.config.agent_idle_s)
                return


async def _is_needed(agent: Agent, lock: int) -> bool:
    try:
        return await agent.is_needed()
    except HotweightsError as error:
        if is_lost(lock):
            log.info("its folder was removed, and the coordinator is away: nobody finds this agent any more")
            return False
        log.info("stays, because nobody can say who else has its images: %s", error)
        return True


def _log_to(path: Path) -> logging.Handler:
    """The agent's own log, bounded."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=LOGS_KEPT)
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger("hotweights")
    root.addHandler(handler)
    if root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    return handler
