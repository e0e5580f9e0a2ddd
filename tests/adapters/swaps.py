"""What every live engine must do, whatever its model and its processor: swaps and undos against fresh engines."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hotweights.worker_client.window.engine import PauseMode, Process
from hotweights.worker_client.window.window import WindowOrder, WindowResult, run_window

from .live_engine import LiveEngine, Oracle

PREPARE_DEADLINE_S = 30.0
# As HOTWEIGHTS_ROUTE has them: by default each module goes by the first route that is known to be right for it.
ROUTES = ("auto", "assembled", "reload")
CAPABILITIES = {"auto": "direct route", "assembled": "assembled route", "reload": "reload route"}
WRITES_MAX = 200


def prepare(
    engine: LiveEngine,
    folder: Path,
    name_map: dict[str, str] | None = None,
    *,
    base: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The answer that ends the preparation: done, or why not. `base` is what serves, by default what it started on."""
    options["base"] = str(engine.base if base is None else base)
    begun = engine.rpc("prepare", str(folder), name_map or {}, options)
    assert begun["ok"], begun
    ends = time.monotonic() + PREPARE_DEADLINE_S
    while time.monotonic() < ends:
        answer = engine.rpc("prepared")
        if not answer["ok"] or answer["done"]:
            return answer
        time.sleep(0.01)
    raise TimeoutError("preparing")


def prepare_all(engine: LiveEngine, folder: Path) -> tuple[bytes, ...]:
    """Every rank's fingerprint of before, once all are prepared anew."""
    assert all(answer["ok"] for answer in engine.rpc_all("release"))
    assert all(answer["ok"] for answer in engine.rpc_all("prepare", str(folder), {}, {"base": str(engine.base)}))
    ends = time.monotonic() + PREPARE_DEADLINE_S
    while time.monotonic() < ends:
        answers = engine.rpc_all("prepared")
        assert all(answer["ok"] for answer in answers), answers
        if all(answer["done"] for answer in answers):
            return tuple(answer["fingerprint"] for answer in answers)
        time.sleep(0.01)
    raise TimeoutError("preparing")


def ranks(engine: LiveEngine) -> tuple[Process, ...]:
    return tuple(Process(answer["pid"], answer["started"]) for answer in engine.rpc_all("identify"))


def window(
    engine: LiveEngine,
    folder: str,
    before: tuple[bytes, ...],
    mode: PauseMode = "recompute",
    *,
    apply_deadline_s: float = 60.0,
    torn_stays: bool = False,
) -> WindowResult:
    """Opens one window as the controller does; "" goes back to what is kept."""
    live = engine.windowed

    async def opened() -> WindowResult:
        order = WindowOrder(
            folder=folder,
            version="v",
            mode=mode,
            begin_by=time.monotonic() + 10,
            quiesce_deadline_s=20.0,
            apply_deadline_s=apply_deadline_s,
            processes=() if torn_stays else (*its_ranks, *await live.cores()),
        )
        return await run_window(live, order, before, lambda: fingerprints_of(live))

    its_ranks = ranks(engine)
    return asyncio.run(opened())


async def fingerprints_of(live: Any) -> tuple[bytes, ...]:
    """As the controller proves what a window left."""
    from hotweights.worker_client.window.identify import prove
    from hotweights.worker_client.window.sleep import Sleep

    return await prove(live, Sleep(live, lambda report: None, lambda: False, lambda: False), 60.0)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_ended(processes: Sequence[Process]) -> None:
    """All of them end, by themselves and soon."""
    ends = time.monotonic() + 10
    while any(runs(process.pid) for process in processes) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not [process for process in processes if runs(process.pid)]


def check_there_and_back(engine: LiveEngine, folder: Path, before: Oracle, after: Oracle) -> dict[str, Any]:
    """Swap, undo, swap, undo: each time tokens and fingerprint are those of a fresh engine. By which routes."""
    for _ in range(2):
        answer = prepare(engine, folder)
        assert answer["ok"], answer
        assert answer["fingerprint"] == before.fingerprint
        assert answer["expected"] in (b"", after.fingerprint)
        applied = engine.rpc("apply", str(folder))
        assert applied["ok"], applied
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == after
        undo(engine)
        assert engine.oracle() == before
    assert engine.rpc("release")["ok"]
    routes: dict[str, Any] = answer["routes"]
    assert bool(routes["reload"][0]) == (not answer["expected"])
    return routes


def undo(engine: LiveEngine) -> None:
    """Back, and nothing cached."""
    undone = engine.rpc("undo")
    assert undone["ok"], undone
    engine.call(engine.llm.reset_prefix_cache())


def check_every_failure(engine: LiveEngine, folder: Path, before: Oracle, after: Oracle) -> int:
    """Fails the apply after every k-th write, and gives how many places there were to fail at."""
    for k in range(WRITES_MAX):
        assert prepare(engine, folder)["ok"]
        engine.inject(f"apply.tensor={k}:raise")
        failed = engine.rpc("apply", str(folder))
        engine.inject("")
        if failed["ok"]:
            undo(engine)
            break
        assert "Injected" in failed["reason"], (k, failed)
        undo(engine)
        assert engine.oracle() == before, k
        assert engine.rpc("apply", str(folder))["ok"], k
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == after, k
        undo(engine)
    assert engine.oracle() == before
    assert engine.rpc("release")["ok"]
    return k
