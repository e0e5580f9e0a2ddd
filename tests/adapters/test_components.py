"""A target and the draft model that speculates for it, as one: over plain modules in vLLM's place."""

import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hotweights.adapters.components import NotTogether, Source, Together, model_of, source
from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.kind import kind
from hotweights.adapters.rank import Rank

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
pytestmark = [pytest.mark.filterwarnings("ignore"), *needs_vllm]

DEADLINE_S = 10.0


class Model(torch.nn.Module):
    """An embedding and a matrix, loaded by their names; what it has no place for is left."""

    def __init__(self, reads: int | None = None) -> None:
        super().__init__()
        self.embed, self.one = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8, bias=False)
        self._reads = reads
        self.given: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        own, loaded = dict(self.named_parameters()), set()
        for count, (name, tensor) in enumerate(weights):
            self.given.append(name)
            if name in own:
                getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)
                loaded.add(name)
            if count + 1 == self._reads:
                break
        return loaded


def checkpoint(folder: Path, seed: int, embed: torch.Tensor | None = None, names: str = "embed one") -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {"embed.weight": torch.randn(16, 8) if embed is None else embed, "one.weight": torch.randn(8, 8)}
    save_file({f"{name}.weight": tensors[f"{name}.weight"] for name in names.split()}, folder / "model.safetensors")
    return folder


def version(folder: Path, seed: int, *, shared: bool = False, draft: str = "embed one") -> Path:
    """With a draft, which has the target's embedding where they share it."""
    checkpoint(folder, seed)
    if draft:
        embed = load_file(folder / "model.safetensors")["embed.weight"] if shared else None
        checkpoint(folder / "draft", 100 + seed, embed, draft)
    return folder


def a_worker(target: Path, draft: Path | None, *, shared: bool = False, wrapped: bool = False) -> Any:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    models: list[Any] = [Model(), Model()]
    for model, folder in zip(models, (target, draft), strict=True):
        record_metadata_for_reloading(model)
        if folder is not None:
            model.load_weights(load_file(folder / "model.safetensors").items())
            model.given.clear()
    if shared:
        models[1].embed = models[0].embed
    proposer = SimpleNamespace(unwrap=lambda: models[1]) if wrapped else models[1]
    of_draft = SimpleNamespace(model=str(draft), hf_config=SimpleNamespace(to_dict=lambda: {"layers": 1}))
    model_config = SimpleNamespace(
        model=str(target),
        dtype=torch.float32,
        quantization=None,
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 2}),
    )
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(local_world_size=1, world_size=1, enable_expert_parallel=False, **parallel),
        lora_config=None,
        model_config=model_config,
        speculative_config=None if draft is None else SimpleNamespace(draft_model_config=of_draft),
    )
    runner = SimpleNamespace(get_model=lambda: models[0], kv_caches=[])
    if draft is not None:
        runner.drafter = SimpleNamespace(model=proposer)
    return SimpleNamespace(model_runner=runner, vllm_config=config, model_config=model_config, device="cpu")


def prepared(rank: Rank, image: Path, base: Path | None) -> Any:
    rank.prepare(image, {}, base=base)
    ends = time.monotonic() + DEADLINE_S
    while (found := rank.prepared()) is None:
        assert time.monotonic() < ends
        time.sleep(0.005)
    return found


def held(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model_of(worker).named_parameters(remove_duplicate=False)}


def of_version(folder: Path) -> dict[str, torch.Tensor]:
    """What an engine holds that was started from it."""
    parts = {"target": folder, "draft": folder / "draft"}
    return {
        f"{part}.{name}": tensor
        for part, at in parts.items()
        for name, tensor in load_file(at / "model.safetensors").items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("route", ["auto", "assembled", "reload"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "one embedding for both"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "in a graph"])
def test_both_are_swapped_and_taken_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, shared: bool, wrapped: bool
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_ROUTE", route)
    one, two = (version(tmp_path / f"v{seed}", seed, shared=shared) for seed in (1, 2))
    worker = a_worker(one, one / "draft", shared=shared, wrapped=wrapped)
    rank, before = Rank(worker), held(worker)
    assert source(worker) is Source.OWN
    found = prepared(rank, two, one)
    assert found.before == fingerprint(rank.model)
    assert [
        count for count, _ in (found.made.routes.direct, found.made.routes.assembled, found.made.routes.reload)
    ] == [(3 if shared else 4) if name == route else 0 for name in ("auto", "assembled", "reload")]
    rank.apply(two)
    rank.prove_written()
    assert same(held(worker), of_version(two))
    assert found.expected in (b"", fingerprint(rank.model))
    # Once for the plan. By a reload what they share comes from the target alone: vLLM may have packed it by then.
    assert isinstance(rank.model, Together)
    given: Any = rank.model.draft.given
    reloads = {"auto": 0, "assembled": 2, "reload": 1}[route]  # rehearsed, but where it is asked for by name
    assert (given.count("embed.weight"), given.count("one.weight")) == (1 if shared else 1 + reloads, 1 + reloads)
    rank.undo()
    assert same(held(worker), before)


def test_the_way_back_is_kept_for_both(tmp_path: Path) -> None:
    one, two = (version(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    worker = a_worker(one, one / "draft")
    rank, before = Rank(worker), held(worker)
    prepared(rank, two, one)
    rank.apply(two)
    assert rank.retain(one)
    prepared(rank, one, two)
    rank.apply(one)
    assert same(held(worker), before)


def test_a_draft_may_leave_to_the_target_what_they_share(tmp_path: Path) -> None:
    one, two = (version(tmp_path / f"v{seed}", seed, draft="one") for seed in (1, 2))
    worker = a_worker(one, one / "draft", shared=True)
    rank = Rank(worker)
    prepared(rank, two, one)
    rank.apply(two)
    now = held(worker)
    assert now["draft.embed.weight"] is not None
    assert torch.equal(now["draft.embed.weight"], now["target.embed.weight"])
    assert same({name: now[name] for name in now if name != "draft.embed.weight"}, of_version(two))


def test_a_version_that_has_two_for_the_one_they_share_is_refused(tmp_path: Path) -> None:
    one, two = version(tmp_path / "v1", 1, shared=True), version(tmp_path / "v2", 2)
    worker = a_worker(one, one / "draft", shared=True)
    rank, before = Rank(worker), held(worker)
    with pytest.raises(NotTogether, match=r"where this version has two: draft/embed.weight"):
        prepared(rank, two, one)
    assert same(held(worker), before)


def test_a_version_without_the_draft_is_refused(tmp_path: Path) -> None:
    one, two = version(tmp_path / "v1", 1), version(tmp_path / "v2", 2, draft="")
    with pytest.raises(NotTogether, match="the version has no draft model"):
        prepared(Rank(a_worker(one, one / "draft")), two, one)


def test_a_draft_that_is_loaded_from_the_targets_checkpoint_is_written_from_it(tmp_path: Path) -> None:
    """As those that predict several tokens are."""
    one, two = (version(tmp_path / f"v{seed}", seed, draft="") for seed in (1, 2))
    worker = a_worker(one, one)
    assert source(worker) is Source.TARGET
    rank = Rank(worker)
    prepared(rank, two, one)
    rank.apply(two)
    two_now = load_file(two / "model.safetensors")
    assert same(held(worker), {f"{part}.{name}": two_now[name] for part in ("target", "draft") for name in two_now})
    rank.undo()


def test_a_draft_from_elsewhere_is_left_alone(tmp_path: Path) -> None:
    one, two = (version(tmp_path / f"v{seed}", seed, draft="") for seed in (1, 2))
    worker = a_worker(one, checkpoint(tmp_path / "elsewhere", 7))
    assert source(worker) is Source.ELSEWHERE
    rank = Rank(worker)
    assert rank.model is worker.model_runner.get_model()
    prepared(rank, two, one)
    rank.apply(two)
    draft = worker.model_runner.drafter.model.state_dict()
    assert same(dict(draft), load_file(tmp_path / "elsewhere" / "model.safetensors"))


def test_a_version_with_a_draft_is_refused_by_an_engine_that_has_another(tmp_path: Path) -> None:
    one, two = version(tmp_path / "v1", 1, draft=""), version(tmp_path / "v2", 2)
    worker = a_worker(one, checkpoint(tmp_path / "elsewhere", 7))
    with pytest.raises(NotTogether, match="start it with speculative_config"):
        prepared(Rank(worker), two, one)


def test_an_engine_that_does_not_speculate_takes_the_target_alone(tmp_path: Path) -> None:
    one, two = (version(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    worker = a_worker(one, None)
    assert source(worker) is Source.NONE
    rank = Rank(worker)
    prepared(rank, two, one)
    rank.apply(two)
    assert same(dict(rank.model.state_dict()), load_file(two / "model.safetensors"))


def test_a_method_without_weights_is_none(tmp_path: Path) -> None:
    one = version(tmp_path / "v1", 1)
    worker = a_worker(one, one / "draft")
    for proposer in (SimpleNamespace(), SimpleNamespace(model=None), SimpleNamespace(model=torch.nn.Identity())):
        worker.model_runner.drafter = proposer
        assert source(worker) is Source.NONE
        assert model_of(worker) is worker.model_runner.get_model()


def test_it_is_one_module_until_one_of_them_is_another(tmp_path: Path) -> None:
    one = version(tmp_path / "v1", 1)
    worker = a_worker(one, one / "draft")
    first = model_of(worker)
    assert model_of(worker) is first
    worker.model_runner.drafter.model = Model()
    assert model_of(worker) is not first


def test_a_draft_makes_it_another_kind(tmp_path: Path) -> None:
    one = version(tmp_path / "v1", 1)
    kinds = {kind(a_worker(one, None)), kind(a_worker(one, one / "draft")), kind(a_worker(one, one))}
    assert len(kinds) == 2  # by the names of what is held and by the draft's config
    worker = a_worker(one, one / "draft")
    assert kind(worker) == kind(a_worker(one, one / "draft"))
    worker.vllm_config.speculative_config.draft_model_config.hf_config.to_dict = lambda: {"layers": 3}
    assert kind(worker) not in kinds


def test_a_target_that_stops_early_does_not_leave_its_tensors_to_the_draft(tmp_path: Path) -> None:
    one = version(tmp_path / "v1", 1)
    together = Together(Model(reads=1), Model(), Source.OWN)
    tensors = {**load_file(one / "model.safetensors"), "draft/one.weight": torch.zeros(8, 8)}
    with pytest.raises(NotTogether, match="the target's loader stopped before"):
        together.load_weights(iter(tensors.items()))
