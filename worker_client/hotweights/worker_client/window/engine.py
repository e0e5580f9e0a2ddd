"""What the window needs of an inference engine. vLLM's is in hotweights.adapters.vllm_engine; tests have their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

PauseMode = Literal["recompute", "drain", "abort", "keep"]
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


@dataclass(frozen=True)
class Process:
    """A process of the engine on this machine. Ids are used again: the start time tells two lives apart."""

    pid: int
    started: int  # clock ticks since boot, from /proc; 0 where the system does not tell


class Engine(Protocol):
    """One engine with all its ranks, in one engine core or, data parallel, in several.

    No method has a deadline of its own: the window keeps them, because a late answer to a call that was given up
    would be taken for the answer to the next. Methods raise EngineFailed.
    """

    @property
    def facts(self) -> EngineFacts:
        """Known without asking the ranks."""

    async def cores(self) -> list[Process]:
        """The processes that run the ranks or are their parents."""

    async def pause(self, mode: PauseMode) -> None:
        """Opens the window: returns when no step runs and, but for `keep`, nothing computed is kept.

        Raises EngineFailed where none can be opened; `resume` is called all the same.
        """

    async def resume(self, salt: str) -> bool:
        """Closes the window. False: its owner had paused the engine, and it stays paused.

        With a `salt` requests from now on share no cached blocks with those before.
        """

    async def rpc(self, method: str, *args: Any) -> list[Status]:
        """Calls `method` on every rank; one answer a rank, numbered over all engine cores."""

    async def set_weight_version(self, version: str) -> None:
        """Tags outputs from now on; does nothing where the engine cannot."""

    async def reset_caches(self) -> bool:
        """Drops what was computed with old weights. False: some of it is still held."""

    async def read(self, begin: bool) -> int:
        """Ranks begin or end to read parameters: it does not fall asleep meanwhile.

        The sleep level; above 0 it is asleep, nothing begins and its parameters must not be touched.
        """

    async def await_wake(self) -> None:
        """Returns once it is awake; what is scheduled waits for a window, or for `let_wake`."""

    async def let_wake(self) -> None:
        """No window is wanted when it wakes: one that is held goes on."""

    async def kill(self, processes: Sequence[Process], reason: str) -> None:
        """Ends the engine's processes at once, by their ids."""

    def condemn(self, reason: str) -> None:
        """It is torn: from now on its server says that it is not ready."""
