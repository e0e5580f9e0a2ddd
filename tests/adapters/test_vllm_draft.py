"""A target and its draft model, of speculative decoding, in one version: on live engines, against fresh ones.

What needs no engine of it is in test_components.py, with vLLM's own loading and reloading over plain modules.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.architecture_engine import ArchitectureEngine, fresh
from tests.adapters.swaps import prepare
from tests.tiny_models import make_eagle, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.matrix,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PLAIN_LINEAR", "1")  # read by the extension, in every worker
        yield


def with_embedding_of_its_own(version: Path, target: Path) -> Path:
    """The version with a draft whose embedding is another than the target's."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(version, target)
    file = target / "draft" / "model.safetensors"
    tensors = load_file(file)
    tensors["embed_tokens.weight"][7, 3] += 1
    save_file(tensors, file, {"format": "pt"})
    return target


def without_draft(version: Path, target: Path) -> Path:
    shutil.copytree(version, target, ignore=shutil.ignore_patterns("draft"))
    return target


def test_an_eagle_head_is_swapped_undone_and_fails_with_its_target(tmp_path: Path) -> None:
    """It shares the target's embedding, which both checkpoints have."""
    one, two = (make_eagle(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    after = fresh(two, 1, "eagle")
    engine = ArchitectureEngine(one, 1, "eagle")
    try:
        before = engine.found()
        assert before["answers"] != after["answers"]
        for route in ("auto", "assembled", "reload"):
            engine.route(route)
            (routes,) = engine.prepare(two, one)
            modules, held = routes["direct" if route == "auto" else route]
            assert (modules > 0, held > 0) == (True, True)
            engine.call("apply", str(two))
            assert engine.found() == after, route
            engine.call("undo")
            assert engine.found() == before, route
        engine.route("auto")
        check_failures(engine, one, two, before, after)
        check_parts(engine, one, two, before, tmp_path)
        check_refused(engine, one, two, tmp_path)
        assert engine.found() == before
    finally:
        engine.close()


def check_failures(
    engine: ArchitectureEngine, one: Path, two: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """In the target, in the draft, and when all is written."""
    engine.prepare(two, one)
    for place in ("apply.tensor=0", "apply.tensor=10", "apply.tensor=14", "apply.end"):
        engine.live.inject(f"{place}:raise")
        (failed,) = engine.live.rpc_all("apply", str(two))
        engine.live.inject("")
        assert "Injected" in failed["reason"], place
        engine.call("undo")
        assert engine.found() == before, place
    engine.call("apply", str(two))
    assert engine.found() == after
    engine.call("undo")


def check_parts(engine: ArchitectureEngine, one: Path, two: Path, before: dict[str, Any], folder: Path) -> None:
    """A version that has another draft only: answers stay, what is held does not."""
    from safetensors.torch import load_file, save_file

    target = shutil.copytree(one, folder / "another-draft")
    file = target / "draft" / "model.safetensors"
    tensors = load_file(two / "draft" / "model.safetensors")
    tensors["embed_tokens.weight"] = load_file(file)["embed_tokens.weight"]  # the target's
    save_file(tensors, file, {"format": "pt"})
    engine.prepare(target, one)
    engine.call("apply", str(target))
    found = engine.found()
    tokens = [[[token for token, _ in answer] for answer in of["answers"]] for of in (found, before)]
    assert tokens[0] == tokens[1]
    assert found["fingerprints"] != before["fingerprints"]
    engine.call("undo")
    assert engine.found() == before


def check_refused(engine: ArchitectureEngine, one: Path, two: Path, folder: Path) -> None:
    """What would leave target and draft of different versions, or is not what a fresh engine would hold."""
    answer = prepare(engine.live, without_draft(two, folder / "no-draft"), base=one)
    assert "the version has no draft model" in answer["reason"]
    answer = prepare(engine.live, with_embedding_of_its_own(two, folder / "apart"), base=one)
    assert "one tensor for target and draft where this version has two: draft/embed_tokens.weight" in answer["reason"]
    assert engine.live.rpc("release")["ok"]


@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "tensor parallel 2"])
def test_a_draft_speculates_as_its_own_version_after_the_swap(tmp_path: Path, ranks: int) -> None:
    """Version two's draft is version two's target: what it says is accepted once it is there, and not before."""
    one, two = (make_tiny_model(tmp_path / f"v{seed}", "llama", seed) for seed in (1, 2))
    make_tiny_model(one / "draft", "llama", 10)
    make_tiny_model(two / "draft", "llama", 2)
    after = fresh(two, ranks, "draft_model")
    engine = ArchitectureEngine(one, ranks, "draft_model")
    try:
        before, accepted_before = engine.found(), accepted()
        engine.prepare(two, one)
        for _ in range(20):
            engine.call("apply", str(two))
            engine.call("undo")
        engine.call("apply", str(two))
        assert engine.found() == after
        assert accepted() > 10 * max(1, accepted_before)
        engine.call("undo")
        assert engine.found() == before
    finally:
        engine.close()


def accepted() -> int:
    """Tokens of the draft that were accepted in this process so far."""
    from prometheus_client import REGISTRY

    return int(
        sum(
            sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "vllm:spec_decode_num_accepted_tokens_total"
        )
    )


def test_a_draft_from_elsewhere_is_left_alone_and_a_version_with_one_is_refused(tmp_path: Path) -> None:
    one, two = (make_tiny_model(tmp_path / f"v{seed}", "llama", seed) for seed in (1, 2))
    draft = make_tiny_model(tmp_path / "elsewhere", "llama", 10)
    engine = ArchitectureEngine(one, 1, "draft_model", draft)
    try:
        before = engine.found()
        engine.prepare(two, one)
        engine.call("apply", str(two))
        assert engine.found()["answers"] != before["answers"]
        engine.call("undo")
        assert engine.found() == before
        make_tiny_model(two / "draft", "llama", 20)
        answer = prepare(engine.live, two, base=one, anew=True)
        assert "the engine loaded its own from another place" in answer["reason"]
    finally:
        engine.close()
