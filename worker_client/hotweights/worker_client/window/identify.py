"""Who an engine is and what it serves, found out before any order and beside everything else.

ranks --identify--> processes, devices, kind  folder it was started from --the agent hashes it--> digest
                                              live parameters --ranks hash them--> fingerprints
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from hotweights.v1.agent_service_pb2 import BorrowImageResponse
from hotweights.wire.errors import HotweightsError, Refused
from hotweights.worker_client.window.engine import Engine, EngineFailed, Process
from hotweights.worker_client.window.sleep import Sleep
from hotweights.worker_client.window.window import (
    NoProof,
    Unanswered,
    Unproven,
    call_ranks,
    fingerprints,
    refusals,
    within,
)

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 10.0
FOLDER_DEADLINE_S = 3600.0
FINGERPRINT_DEADLINE_S = 600.0
POLL_S = 0.02
AGAIN_S = 0.5
RETRY_S = 5.0
KIND_BYTES = 8

# What may go wrong outside this process; anything else is a bug and ends the controller with its traceback.
FAILED = (HotweightsError, EngineFailed, Unanswered, Unproven, OSError)


class Images(Protocol):
    """What the controller asks of the node's agent. A client finds an agent that restarted by itself."""

    async def identify_folder(self, folder: Path) -> bytes: ...

    async def map_image(self, digest: bytes, client_id: str) -> Path: ...

    async def release_image(self, digest: bytes, client_id: str) -> None: ...

    async def borrow_image(self, digest: bytes, client_id: str, *, upload: bool) -> BorrowImageResponse: ...

    async def return_image(self, digest: bytes, client_id: str) -> None: ...

    async def close(self) -> None:
        """Lets go of every image."""


@dataclass(frozen=True)
class Processes:
    """What an engine runs in."""

    rank_pids: tuple[int, ...] = ()
    all: tuple[Process, ...] = ()
    """The ranks first, then the engine cores."""
    lose_weights_asleep: bool = False
    """Whether sleep level 2 discards weights: a device's are, those in host memory are not (FACTS)."""
    kind: str = ""
    """Replicas of the same kind have the same fingerprints of the same image; empty is compared with nobody."""


async def meet(engine: Engine) -> Processes:
    """Asks every rank and core who it is. Raises EngineFailed, Unanswered, Unproven."""
    answers = await call_ranks(engine, "hotweights_identify", CALL_DEADLINE_S)
    if failed := refusals(answers):
        raise EngineFailed(failed)
    answers.sort(key=lambda answer: int(answer["rank"]))
    cores = await within(CALL_DEADLINE_S, "the engine core", engine.cores())
    ranks = [Process(int(answer["pid"]), int(answer["started"])) for answer in answers]
    return Processes(
        rank_pids=tuple(rank.pid for rank in ranks),
        all=tuple(dict.fromkeys((*ranks, *cores))),
        lose_weights_asleep=any(not str(answer["device"]).startswith("cpu") for answer in answers),
        kind=_combined([str(answer.get("kind", "")) for answer in answers]),
    )


def _combined(kinds: Sequence[str]) -> str:
    """The replica's kind, of its ranks' in their order; empty where a rank has none."""
    return blake3("\n".join(kinds).encode()).hexdigest(length=KIND_BYTES) if kinds and all(kinds) else ""


async def identify_folder(connect: Callable[[], Awaitable[Images]], folder: Path) -> tuple[bytes, str]:
    """The folder's digest, or why it has none. Asks until an agent has answered."""
    said = ""
    while True:
        agent: Images | None = None
        try:
            agent = await connect()
            return await within(FOLDER_DEADLINE_S, "the agent", agent.identify_folder(folder)), ""
        except Refused as error:
            if agent is not None:
                log.warning("%s is no image: %s", folder, error)
                return b"", str(error)
            said = _say_once(said, f"no agent for this replica: {error}")
        except FAILED as error:
            said = _say_once(said, f"cannot identify {folder} yet: {error}")
        await asyncio.sleep(RETRY_S)


async def fingerprint(
    engine: Engine, sleep: Sleep, is_torn: Callable[[], bool], in_window: Callable[[], bool]
) -> tuple[bytes, ...]:
    """Of what serves now; empty when a rank cannot tell. Not asked for while a window is open or the engine sleeps."""
    ends, asked = time.monotonic() + FINGERPRINT_DEADLINE_S, uuid.uuid4().hex
    try:
        while time.monotonic() < ends and not is_torn():
            async with sleep.kept_away() as level:
                while not level and time.monotonic() < ends and not is_torn() and not in_window():
                    if proof := await _asked(engine, asked):
                        return proof
                    await asyncio.sleep(POLL_S)
            await asyncio.sleep(AGAIN_S)
    except (EngineFailed, Unanswered, Unproven) as error:
        log.warning("no fingerprint of what is served: %s", error)
    return ()


async def prove(engine: Engine, sleep: Sleep, deadline_s: float) -> tuple[bytes, ...]:
    """The fingerprints after a window. Raises NoProof, EngineFailed, Unproven.

    A rank that does not answer may be at a long step: the engine serves again, and how fast is not for us to judge.
    """
    ends = time.monotonic() + deadline_s
    try:
        async with sleep.kept_away() as level:
            if level:
                raise NoProof("its owner put the engine to sleep")
            asked = uuid.uuid4().hex
            while time.monotonic() < ends:
                if proof := await _asked(engine, asked):
                    return proof
                await asyncio.sleep(POLL_S)
    except Unanswered as error:
        raise NoProof(str(error)) from error
    raise NoProof(f"that took longer than {deadline_s:.0f} s")


async def _asked(engine: Engine, asked: str) -> tuple[bytes, ...]:
    """The fingerprints, once every rank has its own; empty until then. Raises EngineFailed, Unanswered, Unproven."""
    answers = await call_ranks(engine, "hotweights_fingerprint", CALL_DEADLINE_S, asked)
    if failed := refusals(answers):
        raise EngineFailed(failed)
    return fingerprints(answers) if all(answer["done"] for answer in answers) else ()


def _say_once(said: str, text: str) -> str:
    """Warns when the text is news; gives what was said last."""
    if text != said:
        log.warning("%s", text)
    return text
