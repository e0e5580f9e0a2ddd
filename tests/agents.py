"""Agents that were started automatically: they are nobody's child, so tests end them by their id."""

import asyncio
import os
import signal
import time

from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import Config

DEADLINE_S = 20.0


def agent_pid(config: Config) -> int | None:
    """Which agent answers at the configured socket."""

    async def find() -> int | None:
        client = AgentClient(config)
        try:
            return (await client.probe()).pid
        except HotweightsError:
            return None
        finally:
            await client.close()

    return asyncio.run(find())


def end_agent(config: Config) -> None:
    """Ends the agent that answers at the configured socket, if one does, and waits until its socket is gone."""
    pid = agent_pid(config)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    ends_at = time.monotonic() + DEADLINE_S
    while config.agent_socket.exists() and time.monotonic() < ends_at:
        time.sleep(0.05)
