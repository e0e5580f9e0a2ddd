"""The state of a rank, over a plain module in vLLM's place: what is kept, for whom, and until when."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.plain_worker import a_worker, an_image, prepared, until, weight

from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.rank import NotDirect, Rank, RankRefused
from hotweights.adapters.routes import NotReproduced
from hotweights.adapters.torch_module import same_as_folder
from hotweights.adapters.undo import ChangedSincePrepare
from hotweights.adapters.update import NotProven
from hotweights.adapters.vllm_worker import METHODS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [an_image(tmp_path / f"v{seed}", seed) for seed in (1, 2, 3)]


@pytest.fixture
def worker(images: list[Path]) -> Any:
    return a_worker(images[0])


@pytest.fixture
def rank(worker: Any) -> Rank:
    return Rank(worker)


def test_it_goes_there_and_back(rank: Rank, images: list[Path]) -> None:
    held = prepared(rank, images[1], images[0])
    assert held.made.routes.direct == (2, 2 * 64 * 64 * 4)
    before = fingerprint(rank.model)
    assert held.before == before
    rank.apply(images[1])
    rank.prove_written()
    assert fingerprint(rank.model) == held.expected != before
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before


def test_what_was_found_is_told_to_who_asked_until_something_is_written(rank: Rank, images: list[Path]) -> None:
    """Ranks end at different times: one that is done must not begin anew while it waits for the others."""
    found = until(lambda: rank.fingerprint_step("a"))
    weight(rank)[0, 0] += 1
    assert rank.fingerprint_step("a") == found
    assert until(lambda: rank.fingerprint_step("b")) != found
    weight(rank)[0, 0] -= 1
    prepared(rank, images[1], images[0])
    asked = until(lambda: rank.fingerprint_step("c"))
    rank.apply(images[1])
    assert until(lambda: rank.fingerprint_step("c")) != asked


def test_a_way_back_that_is_kept_is_kept_when_asked_again(rank: Rank, images: list[Path]) -> None:
    """One slow rank has the controller ask all of them again."""
    prepared(rank, images[1], images[0])
    rank.apply(images[1])
    for _ in range(2):
        assert rank.retain(images[0])
        assert until(rank.settle)
    (images[0] / "model.safetensors").unlink()
    held = prepared(rank, images[0], None)
    assert held.expected
    rank.apply(images[0])
    assert fingerprint(rank.model) == held.expected


def test_a_way_back_that_was_gone_keeps_none_of_its_own_and_unmaps(rank: Rank, images: list[Path]) -> None:
    """What it would read from is not served any longer: the agent must be able to take it back."""
    prepared(rank, images[1], images[0])
    rank.apply(images[1])
    assert rank.retain(images[0])
    prepared(rank, images[0], None)
    rank.apply(images[0])
    assert not rank.retain(images[1])
    assert until(rank.release)
    assert not [image for image in images if str(image) in Path("/proc/self/maps").read_text()]


def test_a_way_back_whose_image_was_staged_again_is_prepared_anew(rank: Rank, images: list[Path]) -> None:
    prepared(rank, images[1], images[0])
    rank.apply(images[1])
    assert rank.retain(images[0])
    file = images[1] / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    held = prepared(rank, images[0], images[1])
    assert not held.is_way_back
    rank.apply(images[0])
    assert same_as_folder(rank.model, images[0], {})


def test_nothing_is_kept_of_what_was_not_applied(rank: Rank, images: list[Path]) -> None:
    assert not rank.retain(images[0])
    prepared(rank, images[1], images[0])
    assert not rank.retain(images[0])


def test_another_update_drops_what_was_kept_and_unmaps_it(rank: Rank, images: list[Path]) -> None:
    prepared(rank, images[1], images[0])
    rank.apply(images[1])
    assert rank.retain(images[0])
    prepared(rank, images[2], images[1])
    rank.apply(images[2])
    assert until(rank.release)
    maps = Path("/proc/self/maps").read_text()
    assert not [image for image in images if str(image) in maps]


def test_prepared_anew_it_looks_at_what_is_there_now(rank: Rank, images: list[Path]) -> None:
    held = prepared(rank, images[1], images[0])
    weight(rank).zero_()
    assert prepared(rank, images[1], images[0]) is held
    held = prepared(rank, images[1], None, anew=True)
    assert held.made.routes.direct == (0, 0)
    assert held.before == fingerprint(rank.model)


class Odd:
    """A quantisation that nobody here knows: its layers go by vLLM's reload, in the pause."""


def test_what_is_reloaded_in_the_pause_is_rehearsed_there_once(rank: Rank, images: list[Path]) -> None:
    rank.model.get_submodule("two").__dict__["quant_method"] = Odd()
    before = fingerprint(rank.model)
    held = prepared(rank, images[1], images[0])
    assert (held.made.routes.direct[0], held.made.routes.reload[0]) == (1, 1)
    assert held.expected == b"", "only the reload can tell"
    rank.apply(images[1])
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before
    assert rank._plans.rehearsed


def test_a_reload_that_does_not_make_what_is_installed_is_undone(rank: Rank, images: list[Path]) -> None:
    rank.model.get_submodule("two").__dict__["quant_method"] = Odd()
    rank.model.get_parameter("two.weight").data[3, 3] += 1
    before = fingerprint(rank.model)
    prepared(rank, images[1], images[0])
    with pytest.raises(NotReproduced, match=r"changes 1 tensors, first two.weight"):
        rank.apply(images[1])
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before
    assert not rank._plans.rehearsed


def test_whoever_asks_for_the_reload_relies_on_it(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_ROUTE", "reload")
    weight(rank).zero_()
    held = prepared(rank, images[1], images[0])
    assert held.made.routes.reload[0] == 2
    rank.apply(images[1])
    assert same_as_folder(rank.model, images[1], {})
    assert not rank._plans.rehearsed


def test_a_model_that_is_not_all_direct_is_refused_where_that_is_asked_for(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_ROUTE", "direct")
    rank.model.get_submodule("two").__dict__["quant_method"] = Odd()
    with pytest.raises(NotDirect, match=r"1 modules .* first two: its weights are processed by Odd"):
        prepared(rank, images[1], images[0])


def test_a_write_that_reads_back_as_something_else_is_no_success(rank: Rank, images: list[Path]) -> None:
    held = prepared(rank, images[1], images[0])
    held.made.update.writes[0]._pairs[0][1].view(-1)[5] += 1
    with pytest.raises(NotProven):
        rank.apply(images[1])
    rank.undo()
    assert fingerprint(rank.model) == held.before


def test_a_tensor_that_somebody_replaced_meanwhile_is_not_written(rank: Rank, images: list[Path]) -> None:
    prepared(rank, images[1], images[0])
    rank.model.get_submodule("one").weight = torch.nn.Parameter(weight(rank).clone())
    with pytest.raises(ChangedSincePrepare):
        rank.apply(images[1])


def test_an_image_is_applied_once_and_only_the_one_that_was_prepared(rank: Rank, images: list[Path]) -> None:
    with pytest.raises(RankRefused, match="not prepared"):
        rank.apply(images[1])
    prepared(rank, images[1], images[0])
    with pytest.raises(RankRefused, match="not prepared"):
        rank.apply(images[2])
    rank.apply(images[1])
    with pytest.raises(RankRefused, match="applied already"):
        rank.apply(images[1])


def test_methods_answer_whatever_happens(worker: Any, images: list[Path]) -> None:
    assert METHODS["hotweights_undo"](worker, "c", {})["ok"] is False
    assert METHODS["hotweights_prepare"](worker, "c", str(images[1]), {}, {"base": str(images[0])})["ok"]
    answer = until(lambda: (found := METHODS["hotweights_prepared"](worker, "c"))["done"] and found)
    assert answer["routes"]["direct"][0] == 2
    applied = METHODS["hotweights_apply"](worker, "c", str(images[1]))
    assert (applied["ok"], applied["bytes"]) == (True, 2 * 64 * 64 * 4)
    kept = until(
        lambda: (found := METHODS["hotweights_release"](worker, "c", {"retain": str(images[0])}))["ok"] and found
    )
    assert kept["retained"] is True


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_checkpoint_that_is_cast_is_written_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: bool, share: float
) -> None:
    """All storages of a rank pass through the same memory while it prepares."""
    monkeypatch.setattr("hotweights.adapters.update.is_on_host", lambda storage: not on_device)
    torch.manual_seed(1)
    values = {name: torch.randn(64, 64).bfloat16() for name in ("one.weight", "two.weight")}
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        save_file(values, tmp_path / name / "model.safetensors")
        for tensor in values.values():
            tensor.view(-1)[torch.randperm(4096)[: int(4096 * share)]] += 1
    rank = Rank(a_worker(tmp_path / "v1"))
    before = fingerprint(rank.model)
    held = prepared(rank, tmp_path / "v2", tmp_path / "v1")
    assert held.made.routes.direct[0] == 2
    rank.apply(tmp_path / "v2")
    rank.prove_written()
    written = load_file(tmp_path / "v2" / "model.safetensors")
    assert all(torch.equal(rank.model.get_parameter(name), written[name].float()) for name in written)
    assert fingerprint(rank.model) == held.expected
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before


@pytest.mark.parametrize(("device", "passing"), [("cpu", 1), ("cuda", 2)])
def test_what_preparing_asks_for_counts_what_storages_pass_through(rank: Rank, device: str, passing: int) -> None:
    one = 64 * 64 * 4
    rank._worker.device = device
    assert rank._bytes_needed() == 2 * 2 * one + passing * one
