"""What the window needs of an inference engine. vLLM's is in hotweights.adapters.vllm_engine; tests have their own."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

PauseMode = Literal["recompute", "drain", "abort"]
Status = dict[str, Any]
"""A rank's answer: "call", "rank", "ok", "reason" and what the method adds."""


class EngineFailed(Exception):
    """The engine answered with an error of its own, or is gone."""


@dataclass(frozen=True)
class EngineFacts:
    """What is fixed of an engine for its life."""

    name: str  # for people: "vllm 0.32.0"
    folder: str  # the checkpoint it was started from; "" where there is none
    rank_count: int


class Engine(Protocol):
    """One engine with all its ranks.

    No method has a deadline of its own: the window keeps them, because a late answer to a call that was given up
    would be taken for the answer to the next. Methods raise EngineFailed.
    """

    @property
    def facts(self) -> EngineFacts:
        """Known without asking the ranks."""

    async def pause(self, mode: PauseMode) -> None:
        """Returns when no step runs, nothing in flight uses old cache blocks and caches are empty."""

    async def resume(self) -> None:
        """Lets the scheduler go on."""

    async def rpc(self, method: str, *args: Any) -> list[Status]:
        """Calls `method` on every rank; one answer a rank."""

    async def set_weight_version(self, version: str) -> None:
        """Tags outputs from now on; does nothing where the engine cannot."""

    async def reset_caches(self) -> bool:
        """Drops what was computed with old weights. False: some of it is still held."""

    async def kill(self, reason: str) -> None:
        """Ends the engine's processes at once, by their ids."""
