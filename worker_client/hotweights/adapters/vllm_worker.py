"""The `hotweights_*` methods of a vLLM worker, called through `collective_rpc`.

They never raise: with tensor parallelism one exception puts all later replies out of step (FACTS; upstream 57846).
Each answers {"call", "rank", "ok", "reason", ...} in plain data. Set on WorkerBase by the plugin, or found through
`HotweightsWorkerExtension`; `self` is the worker either way.
"""

import functools
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotweights.adapters.kind import kind
from hotweights.adapters.processes import process

if TYPE_CHECKING:
    from hotweights.adapters.rank import Rank

log = logging.getLogger(__name__)

Status = dict[str, Any]


def _answered(method: Callable[..., Status]) -> Callable[..., Status]:
    """Turns whatever happens into a status.

    The one place that catches everything: a worker that raises takes its engine with it, and the text goes to the
    controller, which reports it.
    """

    @functools.wraps(method)
    def call(self: Any, call: str, *args: Any) -> Status:
        status: Status = {"call": call, "rank": int(getattr(self, "rank", 0)), "ok": True, "reason": ""}
        try:
            status.update(method(self, *args))
        except Exception as error:
            log.warning("%s failed: %r", method.__name__, error, exc_info=True)
            status.update(ok=False, reason=f"{type(error).__name__}: {error}")
        return status

    return call


def _rank(worker: Any) -> "Rank":
    """This worker's state; made at the first call, since `__init__` of an extension never runs."""
    from hotweights.adapters.rank import Rank

    state: Rank | None = worker.__dict__.get("_hotweights_rank")
    if state is None:
        state = Rank(worker)
        worker.__dict__["_hotweights_rank"] = state
    return state


@_answered
def hotweights_identify(self: Any) -> Status:
    """Which process this is, and of what kind."""
    device = str(getattr(self, "device", "cpu"))
    own = process(os.getpid())
    host = socket.gethostname()
    return {
        "pid": own.pid,
        "started": own.started,
        "host": host,
        "device": device,
        "dtype": str(self.model_config.dtype),
        "kind": kind(self),
    }


@_answered
def hotweights_fingerprint(self: Any, asked: str = "") -> Status:
    """Poll until `done`; the work is done beside the serving engine.

    Ranks are not done at the same time: to the same `asked` one that is done goes on answering what it found.
    """
    digest = _rank(self).fingerprint_step(asked)
    return {"done": digest is not None, "fingerprint": digest or b""}


@_answered
def hotweights_prepare(
    self: Any, folder: str, name_map: dict[str, str], options: dict[str, Any] | None = None
) -> Status:
    """Starts to prepare the image in `folder`; poll `hotweights_prepared`.

    `options`: `check_finite` (False) refuses an image with NaN or infinite values; `base` is the folder of the image
    that is installed, without which nothing is written directly; `anew` (False) drops what was prepared before; `lent`
    is where others hold the image in GPU memory, see `lent.py`.
    """
    asked = options or {}
    base = Path(asked["base"]) if asked.get("base") else None
    flags = {name: bool(asked.get(name)) for name in ("check_finite", "anew")}
    _rank(self).prepare(Path(folder), name_map, base=base, lent=asked.get("lent") or {}, **flags)
    return {}


@_answered
def hotweights_prepared(self: Any) -> Status:
    """Whether the apply can be called; not ok when it never can."""
    held = _rank(self).prepared()
    if held is None:
        return {"done": False}
    return {
        "done": True,
        "fingerprint": held.before,
        "expected": held.expected,
        "tensors": len(held.image),
        "caches_spoilt": held.caches_spoilt,
        "routes": asdict(held.made.routes),
    }


@_answered
def hotweights_apply(self: Any, folder: str) -> Status:
    """Writes the prepared image and reads back what was written. Not ok means: undo in every rank."""
    start = time.perf_counter()
    rank = _rank(self)
    held = rank.apply(Path(folder))
    proof = rank.prove_written()
    return {
        "written": proof,
        "tensors": len(held.image),
        "bytes": sum(write.new_bytes for write in held.made.update.writes),
        **_times(start, rank),
    }


@_answered
def hotweights_undo(self: Any, options: dict[str, Any] | None = None) -> Status:
    """Back to what was served before the apply; ok only when reading it back proves that.

    `options`: `clear_caches` (False) zeros the KV cache too: for when the engine has run since the apply.
    """
    start = time.perf_counter()
    rank = _rank(self)
    rank.undo(clear_caches=bool((options or {}).get("clear_caches")))
    rank.prove_undone()
    return _times(start, rank)


def _times(start: float, rank: "Rank") -> Status:
    """Of the write, of its reading back, and of clearing the KV cache where that was needed."""
    read_back_s, clearing_s = rank.spent_s
    return {
        "write_ms": (time.perf_counter() - start - read_back_s - clearing_s) * 1000,
        "proof_ms": read_back_s * 1000,
        "clear_ms": clearing_s * 1000,
    }


@_answered
def hotweights_release(self: Any, options: dict[str, Any] | None = None) -> Status:
    """Drops what was prepared and unmaps. Not ok while something holds on to the mapping: its files must stay.

    `options`: `retain` is the folder of the image that served before; the way back to it is kept ready where possible.
    """
    folder, rank = str((options or {}).get("retain") or ""), _rank(self)
    retained = bool(folder) and rank.retain(Path(folder))
    if rank.settle() if retained else rank.release():
        return {"retained": retained}
    return {"ok": False, "reason": "a tensor of the mapped image is still in use"}


METHODS: dict[str, Callable[..., Status]] = {
    method.__name__: method
    for method in (
        hotweights_identify,
        hotweights_fingerprint,
        hotweights_prepare,
        hotweights_prepared,
        hotweights_apply,
        hotweights_undo,
        hotweights_release,
    )
}


def install() -> None:
    """Sets the methods on vLLM's WorkerBase; again does nothing new."""
    from vllm.v1.worker.worker_base import WorkerBase

    for name, method in METHODS.items():
        setattr(WorkerBase, name, method)
