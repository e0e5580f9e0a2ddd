"""What every live engine must do, whatever its model and its processor: swaps and undos against fresh engines."""

import time
from pathlib import Path
from typing import Any

from .live_engine import LiveEngine, Oracle

PREPARE_DEADLINE_S = 30.0
ROUTES = ("assembled", "reload")
WRITES_MAX = 200


def prepare(engine: LiveEngine, folder: Path, name_map: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer that ends the preparation: done, or why not."""
    begun = engine.rpc("prepare", str(folder), name_map or {})
    assert begun["ok"], begun
    ends = time.monotonic() + PREPARE_DEADLINE_S
    while time.monotonic() < ends:
        answer = engine.rpc("prepared")
        if not answer["ok"] or answer["done"]:
            return answer
        time.sleep(0.01)
    raise TimeoutError("preparing")


def check_there_and_back(engine: LiveEngine, folder: Path, before: Oracle, after: Oracle, route: str) -> None:
    """Swap, undo, swap, undo: each time tokens and fingerprint are those of a fresh engine."""
    for _ in range(2):
        assert prepare(engine, folder)["fingerprint"] == before.fingerprint
        applied = engine.rpc("apply", str(folder))
        assert applied["ok"], applied
        assert (applied["route"], applied["fingerprint"]) == (route, after.fingerprint)
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == after
        undone = engine.rpc("undo")
        assert undone["ok"], undone
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == before
    assert engine.rpc("release")["ok"]


def check_every_failure(engine: LiveEngine, folder: Path, before: Oracle, after: Oracle) -> int:
    """Fails the apply after every k-th write, and gives how many places there were to fail at."""
    for k in range(WRITES_MAX):
        assert prepare(engine, folder)["ok"]
        engine.inject(f"apply.tensor={k}:raise")
        failed = engine.rpc("apply", str(folder))
        engine.inject("")
        if failed["ok"]:
            assert engine.rpc("undo").get("fingerprint") == before.fingerprint
            break
        assert "Injected" in failed["reason"], (k, failed)
        undone = engine.rpc("undo")
        assert undone["ok"], (k, undone)
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.tokens() == before.tokens, k
        assert engine.rpc("apply", str(folder)).get("fingerprint") == after.fingerprint, k
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.tokens() == after.tokens, k
        assert engine.rpc("undo").get("fingerprint") == before.fingerprint, k
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.rpc("release")["ok"]
    return k
