"""Swaps in one live vLLM engine, against what freshly started engines answer.

The tests share the engine of conftest.py; each leaves it serving v1.
"""

import asyncio
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hotweights.worker_client.window.window import Outcome, WindowOrder, call_ranks, fingerprints, run_window

from .live_engine import PROMPTS, LiveEngine, Oracle
from .swaps import CAPABILITIES, ROUTES, check_every_failure, check_there_and_back, fingerprints_of, prepare, undo

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("AsyncLLM"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    # vLLM's and its dependencies' own warnings are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]


MODULES = 15  # that loaders write: two embeddings, five norms, four linear layers in each of two


@pytest.fixture
def image(folders: dict[str, Path], tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A copy of v2 whose tensors were changed by a function."""

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folders["v2"] / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.capability(CAPABILITIES[name])) for name in ROUTES])
def route(request: pytest.FixtureRequest, engine: LiveEngine) -> Iterator[str]:
    engine.extension("inject_route", request.param)
    yield request.param
    engine.extension("inject_route", "auto")


def test_a_swap_equals_a_fresh_engine_in_outputs_and_fingerprint_and_so_does_its_undo(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, route: str
) -> None:
    assert v1.tokens != v2.tokens
    routes = check_there_and_back(engine, folders["v2"], v1, v2)
    packed = engine.extension("packed_layer_count")
    direct = {"auto": MODULES - packed}.get(route, 0)
    assert routes["direct"][0] == direct
    assert routes["reload" if route == "reload" else "assembled"][0] == MODULES - direct
    if route == "auto" and packed:
        (reason,) = routes["reasons"]
        assert reason.endswith(f"and {packed - 1} more: its weights are packed for this CPU")


@pytest.mark.capability("undo after every k-th tensor")
def test_a_failure_after_every_kth_write_is_undone_and_a_good_apply_follows(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle, route: str
) -> None:
    # By reload the checkpoint's 21 tensors; otherwise what differs: both embeddings, and the packed layers or, where
    # nothing is packed, the weights of the eight linear ones.
    writes = 21 if route == "reload" else 2 + (engine.extension("packed_layer_count") or 8)
    assert check_every_failure(engine, folders["v2"], v1, v2) == writes + 1


@pytest.mark.capability("serving while assembling")
def test_the_engine_serves_unchanged_while_an_update_is_assembled(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    """Tokens flow and are the old version's until the apply, and after a preparation that is never applied."""
    expected = engine.call(engine.answer(PROMPTS[0], 400))
    for _ in range(3):
        running = engine.submit(engine.answer(PROMPTS[0], 400))
        answer = prepare(engine, folders["v2"])
        assert not running.done()
        assert answer["fingerprint"] == v1.fingerprint
        assert running.result(60) == expected
        assert engine.oracle() == v1
        assert engine.rpc("release")["ok"]
        assert engine.oracle() == v1


def test_the_way_back_of_a_commit_is_ready_before_it_is_asked_for(
    engine: LiveEngine, folders: dict[str, Path], tmp_path: Path, v1: Oracle, v2: Oracle
) -> None:
    """Prepared as the image of before, which is not even looked at; and from there the way forth again."""
    gone = tmp_path / "gone"
    assert prepare(engine, folders["v2"])["ok"]
    assert engine.rpc("apply", str(folders["v2"]))["ok"]
    assert engine.rpc("release", {"retain": str(gone)})["retained"]
    for _ in range(2):
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == v2
        answer = prepare(engine, gone)
        assert (answer["fingerprint"], answer["expected"]) == (v2.fingerprint, v1.fingerprint)
        assert engine.rpc("apply", str(gone))["ok"]
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == v1
        undo(engine)
    assert engine.rpc("apply", str(gone))["ok"]
    assert engine.rpc("release")["ok"]
    assert engine.extension("shadow_is_gone")
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v1
    assert not prepare(engine, gone)["ok"], "it was dropped"


def test_a_way_back_that_is_kept_goes_with_the_weights_it_was_for(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    assert prepare(engine, folders["v2"])["ok"]
    assert engine.rpc("apply", str(folders["v2"]))["ok"]
    assert engine.rpc("release", {"retain": str(folders["v1"])})["retained"]
    engine.call(engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders["v1"])}))
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v1
    answer = prepare(engine, folders["v1"], base=folders["v1"])
    assert (answer["fingerprint"], answer["expected"]) == (v1.fingerprint, v1.fingerprint)
    assert engine.rpc("apply", str(folders["v1"]))["ok"]
    assert engine.rpc("release")["ok"]
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v1


def test_nothing_of_the_shadow_stays(engine: LiveEngine, folders: dict[str, Path], v1: Oracle) -> None:
    engine.extension("inject_route", "assembled")  # on a CPU that packs nothing there would be no shadow
    assert prepare(engine, folders["v2"])["ok"]
    engine.extension("inject_route", "auto")
    assert not engine.extension("shadow_is_gone")
    assert engine.rpc("apply", str(folders["v2"]))["ok"]
    assert engine.rpc("undo")["ok"]
    assert engine.rpc("release")["ok"]
    assert engine.extension("shadow_is_gone")
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v1


def test_a_model_that_is_not_understood_is_reloaded_or_refused_by_name(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    engine.extension("inject_friend", True)
    try:
        routes = prepare(engine, folders["v2"])["routes"]
        packed = engine.extension("packed_layer_count")
        assert (routes["assembled"][0], routes["reload"][0]) == (0, packed)
        assert engine.rpc("apply", str(folders["v2"]))["ok"]
        engine.call(engine.llm.reset_prefix_cache())
        assert engine.oracle() == v2
        undo(engine)
        assert engine.oracle() == v1
        assert engine.rpc("release")["ok"]
        engine.extension("inject_route", "assembled")
        refused = prepare(engine, folders["v2"])
        assert not refused["ok"]
        assert "friends" in refused["reason"]
    finally:
        engine.extension("inject_route", "auto")
        engine.extension("inject_friend", False)


@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "packed"])
def test_what_reads_back_as_something_else_than_was_prepared_is_a_failure_and_is_undone(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, packed: bool
) -> None:
    if packed and not engine.extension("packed_layer_count"):
        pytest.skip("this processor packs nothing")
    assert prepare(engine, folders["v2"])["ok"]
    engine.extension("spoil_write", packed)
    failed = engine.rpc("apply", str(folders["v2"]))
    assert not failed["ok"]
    assert "NotProven" in failed["reason"]
    undo(engine)
    assert engine.rpc("release")["ok"]
    assert engine.oracle() == v1


def test_what_proves_to_be_something_else_after_the_resume_is_taken_back_in_a_second_pause(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    """A value that was written changes after it was read back: nothing but the fingerprint of everything shows that."""
    live = engine.windowed
    answer = prepare(engine, folders["v2"])
    order = WindowOrder(str(folders["v2"]), "v2", "recompute", time.monotonic() + 10, 20.0, 30.0, version_before="v1")
    order = dataclasses.replace(order, expected=(answer["expected"],))
    served: list[Any] = []

    async def prove() -> tuple[bytes, ...]:
        if not served:
            served.append(await asyncio.to_thread(engine.tokens))
            await asyncio.to_thread(engine.extension, "spoil_live", "model.embed_tokens.weight")
        return await fingerprints_of(live)

    result = asyncio.run(run_window(live, order, (answer["fingerprint"],), prove))
    assert result.outcome is Outcome.UNDONE, result
    assert "fingerprint is another" in result.reason
    assert result.times.prove_ms > 0
    assert served == [v2.tokens], "it had resumed"
    assert engine.oracle() == v1
    assert engine.rpc("release")["ok"]


NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[GATE]


def _add(tensors: dict[str, Any]) -> None:
    tensors["model.extra.weight"] = tensors[NORM].clone()


def _reshape(tensors: dict[str, Any]) -> None:
    tensors[NORM] = tensors[NORM][:-1].clone()


def _retype(tensors: dict[str, Any]) -> None:
    tensors[NORM] = tensors[NORM].float()


@pytest.mark.parametrize(
    ("change", "name"),
    [(_drop, GATE), (_add, "model.extra.weight"), (_reshape, NORM), (_retype, NORM)],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_an_image_that_does_not_fit_is_refused_while_the_engine_serves(
    engine: LiveEngine, image: Any, v1: Oracle, change: Any, name: str
) -> None:
    refused = prepare(engine, image(change))
    assert not refused["ok"]
    assert name in refused["reason"]
    assert not engine.rpc("apply", str(image(change)))["ok"]
    assert engine.oracle() == v1


def test_a_truncated_file_is_refused(engine: LiveEngine, folders: dict[str, Path], tmp_path: Path, v1: Oracle) -> None:
    whole = (folders["v2"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    refused = prepare(engine, tmp_path)
    assert not refused["ok"]
    assert "outside the file" in refused["reason"]


def test_a_name_map_renames_tensors_and_prefixes(engine: LiveEngine, image: Any, v1: Oracle, v2: Oracle) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors["trainer." + name] = tensors.pop(name)
        tensors["head"] = tensors.pop("trainer.lm_head.weight")

    folder = image(rename)
    assert not prepare(engine, folder)["ok"]
    answer = prepare(engine, folder, {"trainer.": "", "head": "lm_head.weight"})
    assert answer["ok"], answer
    assert engine.rpc("apply", str(folder))["ok"]
    engine.call(engine.llm.reset_prefix_cache())
    assert engine.oracle() == v2
    undo(engine)
    assert engine.oracle() == v1
    assert engine.rpc("release")["ok"]


def test_calls_out_of_order_are_refused_and_harm_nothing(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle
) -> None:
    for method, args in (("apply", (str(folders["v2"]),)), ("undo", ()), ("prepared", ())):
        answer = engine.rpc(method, *args)
        assert not answer["ok"]
        assert answer["call"] == "test"
    assert not engine.rpc("prepare")["ok"]  # not even wrong arguments raise
    assert engine.oracle() == v1


@pytest.mark.capability("caches after a swap")
def test_the_same_request_asked_before_and_after_meets_no_old_cache_blocks(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    live = engine.windowed

    async def swap(folder: str, mode: Any, before: tuple[bytes, ...]) -> tuple[bytes, ...]:
        order = WindowOrder(folder, "v", mode, time.monotonic() + 10, 20.0, 30.0)
        result = await run_window(live, order, before, lambda: fingerprints_of(live))
        assert result.outcome is Outcome.APPLIED, result
        return result.fingerprints

    async def there_and_back(mode: Any) -> None:
        engine_answers = [asyncio.wrap_future(engine.submit(engine.answer(prompt, 200))) for prompt in ("t5 t6", "t7")]
        await asyncio.sleep(0.2)
        assert await swap(str(folders["v2"]), mode, before) == (v2.fingerprint,)
        await asyncio.gather(*engine_answers)
        assert await asyncio.to_thread(engine.tokens) == v2.tokens
        assert await swap("", mode, before) == before
        assert await asyncio.to_thread(engine.tokens) == v1.tokens

    assert engine.tokens() == v1.tokens
    for mode in ("recompute", "drain", "abort"):
        before = (prepare(engine, folders["v2"])["fingerprint"],)
        asyncio.run(there_and_back(mode))
    (status,) = asyncio.run(call_ranks(live, "hotweights_release", 10.0))
    assert status["ok"]
    assert fingerprints([{**engine.rpc("fingerprint"), "fingerprint": b"x"}]) == (b"x",)


def test_orders_of_a_coordinator_swap_the_engine_and_take_it_back(
    engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle
) -> None:
    asyncio.run(_follow_orders(engine, folders, v1, v2))


async def _follow_orders(engine: LiveEngine, folders: dict[str, Path], v1: Oracle, v2: Oracle) -> None:
    from tests.worker_client.window.fakes import FakeAgent, FakeStream

    from hotweights.v1 import worker_service_pb2 as pb
    from hotweights.worker_client.window.controller import Identity, ReplicaController
    from hotweights.worker_client.window.identify import Images

    agent, stream = FakeAgent(), FakeStream()
    agent.held, agent.folders = {b"v1", b"v2"}, {name.encode(): folder for name, folder in folders.items()}

    async def connect() -> Images:
        return agent

    controller = ReplicaController(Identity("r", "n"), engine.windowed, connect, stream.open)
    running = asyncio.ensure_future(controller.run())

    async def prepared() -> None:
        await stream.give(prepare=pb.PrepareImage(manifest_digest=b"v2", deadline_s=20))
        assert (await stream.take()).prepared.base_digest == b"v1"

    async def ordered(digest: bytes, **more: Any) -> pb.Report:
        apply = pb.ApplyImage(
            manifest_digest=digest, version=digest.decode(), validity_s=5, quiesce_deadline_s=10, apply_deadline_s=20
        )
        apply.MergeFrom(pb.ApplyImage(**more))
        assert await stream.give(apply=apply) == ""
        return await stream.take()

    first = (await stream.take()).active_changed
    assert (first.active_digest, list(first.fingerprints)) == (b"v1", [v1.fingerprint])
    await prepared()
    applied = (await ordered(b"v2")).applied
    assert list(applied.fingerprints) == [v2.fingerprint]
    assert applied.window.apply_ms > 0
    assert await asyncio.to_thread(engine.tokens) == v2.tokens
    if hasattr(engine.llm, "get_weight_version"):
        version = asyncio.wrap_future(engine.submit(engine.llm.get_weight_version()))
        assert await version == "v2"

    # By the kept copies, then, after the end of an update, by the image of v1.
    assert list((await ordered(b"v1", restore=True)).applied.fingerprints) == [v1.fingerprint]
    await prepared()
    assert list((await ordered(b"v2")).applied.fingerprints) == [v2.fingerprint]
    await stream.give(end=pb.EndUpdate(committed=True))
    assert list((await ordered(b"v1", restore=True)).applied.fingerprints) == [v1.fingerprint]
    assert await asyncio.to_thread(engine.tokens) == v1.tokens

    await asyncio.to_thread(engine.inject, "apply.end:raise")
    await prepared()
    failed = (await ordered(b"v2")).apply_failed
    await asyncio.to_thread(engine.inject, "")
    assert (failed.failure, failed.active_digest) == (pb.APPLY_FAILURE_UNDONE, b"v1")
    assert await asyncio.to_thread(engine.tokens) == v1.tokens
    await stream.give(end=pb.EndUpdate())
    controller.close()
    await asyncio.wait_for(running, 10)


@pytest.mark.capability("engine's weight version")
def test_the_engine_is_told_the_name_of_the_version(engine: LiveEngine) -> None:
    asyncio.run(engine.windowed.set_weight_version("named"))
    assert engine.call(engine.llm.get_weight_version()) == "named"


@pytest.mark.capability("weight version tags")
def test_an_answer_says_which_version_each_token_is_of(engine: LiveEngine) -> None:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

    if "weight_versions" not in CompletionOutput.__dataclass_fields__:
        pytest.skip("this vLLM tags no outputs with versions; 0.32 is the first that does")

    async def answered_by_two_versions() -> list[tuple[str, int, int]]:
        """Told of a second version at the tenth token; the spans of the whole answer."""
        params, seen, last = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), 0, None
        async for last in engine.llm.generate(PROMPTS[0], params, "tagged"):
            if seen < 10 <= len(last.outputs[0].token_ids):
                await engine.llm.update_weight_version("two")
            seen = len(last.outputs[0].token_ids)
        assert last is not None
        return [(span.version, span.start, span.end) for span in last.outputs[0].weight_versions]

    asyncio.run(engine.windowed.set_weight_version("one"))
    (one, start, turn), (two, goes_on, end) = engine.call(answered_by_two_versions())
    assert (one, two) == ("one", "two")
    assert (start, end) == (0, 100)
    assert 10 <= turn == goes_on < 100


def test_the_checkpoints_differ_in_weights_only(folders: dict[str, Path]) -> None:
    one, other = (json.loads((folder / "config.json").read_text()) for folder in folders.values())
    assert one == other
