"""Every architecture on a live engine: versions swapped, whole and in part, and taken back, against fresh engines.

Linear layers stay plain here, as on a CPU that packs nothing, so that the direct route is what is tried; what is packed
or quantised has tests of its own. What was seen goes into docs/architectures.json with --record-architectures, and
scripts/architectures_table.py makes the table of docs/VLLM_INTEGRATION.md of it.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.architecture_engine import ArchitectureEngine, fresh
from tests.architectures import Recorded
from tests.tiny_models import ARCHITECTURES, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.matrix,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

SWAPS = 20
# Their experts are packed, which vLLM's reload does not do: what a part of a version comes to says a fresh engine.
PACKED = ("mixtral", "qwen3-moe", "deepseek")


def norms(name: str) -> bool:
    return "norm" in name


def q_only(name: str) -> bool:
    return "q_proj" in name


def one_expert(name: str) -> bool:
    return ".experts.1." in name


def one_layer(name: str) -> bool:
    return ".layers.1." in name


PARTS = {"norms": norms, "q of q, k, v": q_only, "one expert": one_expert, "one layer": one_layer}


def partial(one: Path, two: Path, target: Path, chosen: Callable[[str], bool]) -> Path | None:
    """Version one with some tensors of version two; None where there are none such, or they are equal."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(one, target)
    changed = False
    for file in target.glob("*.safetensors"):
        tensors, other = load_file(file), load_file(two / file.name)
        for name in filter(chosen, tensors):
            tensors[name] = other[name] if "norm" not in name else other[name] + 0.25
            changed = True
        save_file(tensors, file, {"format": "pt"})
    return target if changed else None


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PLAIN_LINEAR", "1")  # read by the extension, in every worker
        yield


@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "tensor parallel 2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_versions_are_swapped_bit_for_bit(architecture: str, ranks: int, tmp_path: Path, recorded: Recorded) -> None:
    one, two = (make_tiny_model(tmp_path / f"v{seed}", architecture, seed) for seed in (1, 2))
    recorded.begin("engine", architecture, ranks)
    after = fresh(two, ranks)
    engine = ArchitectureEngine(one, ranks)
    try:
        before = engine.found()
        assert engine.found() == before, "the engine itself answers alike"
        assert before["answers"] != after["answers"]
        routes = engine.prepare(two, one)
        for _ in range(SWAPS):
            engine.call("apply", str(two))
            engine.call("undo")
        engine.call("apply", str(two))
        assert engine.found() == after
        engine.call("undo")
        assert engine.found() == before
        made = {name: partial(one, two, tmp_path / name.replace(" ", "-"), chosen) for name, chosen in PARTS.items()}
        parts = {name: folder for name, folder in made.items() if folder is not None}
        for name, folder in parts.items():
            expected = fresh(folder, ranks) if architecture in PACKED else swapped(engine, "reload", folder, one)
            assert swapped(engine, "auto", folder, one) == expected, name
        assert {"norms", "one layer"} <= set(parts)
        assert engine.found() == before
    finally:
        engine.close()
    recorded.ended(routes, list(parts))


def swapped(engine: ArchitectureEngine, route: str, folder: Path, base: Path) -> Any:
    """What is found on the version in `folder`, which was written by that route; then `base` serves again."""
    engine.route(route)
    engine.prepare(folder, base)
    engine.call("apply", str(folder))
    found = engine.found()
    engine.call("undo")
    return found
