"""What others lend in GPU memory is what is written, as long as it is lent; GPU memory is a double (`lent_memory`)."""

import importlib.util
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import lent_memory
from tests.adapters.plain_worker import a_worker, an_image, prepared, until, weight
from tests.lent_memory import DEVICE, Lent

from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.rank import Rank
from hotweights.adapters.torch_module import same_as_folder
from hotweights.adapters.update import NotProven

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

SEAL = secrets.token_bytes(64)
WIDTH = 512


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [an_image(tmp_path / f"v{seed}", seed, WIDTH) for seed in (1, 2, 3)]


@pytest.fixture
def rank(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    lent_memory.pretend(monkeypatch, tmp_path)
    return Rank(a_worker(images[0], size=WIDTH))


def lend(image: Path, **other: Any) -> tuple[Lent, dict[str, Any]]:
    """The image's file as it is, behind the seal."""
    content = (image / "model.safetensors").read_bytes()
    memory = Lent(0, len(SEAL) + len(content))
    memory.write(0, SEAL + content)
    ranges = [("model.safetensors", 0, len(SEAL), len(content))]
    told = {"device": DEVICE, "handle": memory.handle, "seal": SEAL, "ranges": ranges, **other}
    return memory, {"left_s": 100.0, "memories": [told]}


def spoil(memory: Lent) -> None:
    memory.write(len(SEAL) + 5000, bytes(8))


def test_what_is_lent_is_what_is_written(rank: Rank, images: list[Path]) -> None:
    memory, lent = lend(images[1])
    held = prepared(rank, images[1], images[0], lent=lent)
    assert held.made.routes.sources == (f"cuda-ipc: 2 MiB of {DEVICE} of another process",)
    before = fingerprint(rank.model)
    rank.apply(images[1])
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before
    spoil(memory)
    rank.apply(images[1])
    assert not same_as_folder(rank.model, images[1], {}), "it was what the writes read from"
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before


def other_values(memory: Lent) -> None:
    spoil(memory)


def halves_of_a_block_changed_places(memory: Lent) -> None:
    at = len(SEAL) + 65536
    memory.write(at, memory.read(at + 4096, 4096) + memory.read(at, 4096))


def signs_of_two_words(memory: Lent) -> None:
    """Their plain sum is the same."""
    for at in (len(SEAL) + 40000, len(SEAL) + 40008):
        (word,) = memory.read(at + 7, 1)
        memory.write(at + 7, bytes([word ^ 128]))


def more_here_and_less_there(memory: Lent) -> None:
    for at, more in ((len(SEAL) + 40000, 1), (len(SEAL) + 40008, -1)):
        word = int.from_bytes(memory.read(at, 8), "little") + more
        memory.write(at, word.to_bytes(8, "little"))


@pytest.mark.parametrize(
    "change", [other_values, halves_of_a_block_changed_places, signs_of_two_words, more_here_and_less_there]
)
def test_where_something_else_is_lent_the_host_has_it(
    rank: Rank, images: list[Path], change: Callable[[Lent], None]
) -> None:
    memory, lent = lend(images[1])
    prepared(rank, images[1], images[0], lent=lent)
    change(memory)
    rank.apply(images[1])
    assert not same_as_folder(rank.model, images[1], {})
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})
    weight(rank)[3, 3] += 1
    with pytest.raises(NotProven):  # that is not the lender's doing
        rank.prove_written()


def test_what_was_given_back_is_read_no_more_and_the_way_there_comes_from_the_host(
    rank: Rank, images: list[Path]
) -> None:
    memory, lent = lend(images[1])
    prepared(rank, images[1], images[0], lent=lent)
    rank.apply(images[1])
    rank.prove_written()
    assert rank.retain(images[0])
    spoil(memory)
    prepared(rank, images[0], None)
    rank.apply(images[0])
    rank.prove_written()
    assert same_as_folder(rank.model, images[0], {})
    rank.undo()  # of the way back: the way there
    rank.prove_undone()
    assert same_as_folder(rank.model, images[1], {})


def test_a_lease_that_is_nearly_over_is_not_relied_on(rank: Rank, images: list[Path]) -> None:
    memory, lent = lend(images[1])
    prepared(rank, images[1], images[0], lent={**lent, "left_s": 9.0})
    spoil(memory)
    rank.apply(images[1])
    assert same_as_folder(rank.model, images[1], {}), "and not only once it was found to be wrong"
    rank.prove_written()


def test_memory_that_is_something_else_by_now_is_not_read(rank: Rank, images: list[Path]) -> None:
    memory, lent = lend(images[1])
    memory.write(0, bytes(8))
    held = prepared(rank, images[1], images[0], lent=lent)
    assert held.made.routes.sources == (f"host memory: what was lent on {DEVICE} is something else by now",)
    rank.apply(images[1])
    rank.prove_written()


def test_memory_that_was_freed_is_not_read(rank: Rank, images: list[Path]) -> None:
    memory, lent = lend(images[1])
    memory.close()
    held = prepared(rank, images[1], images[0], lent=lent)
    assert held.made.routes.sources == ("host memory: borrowing GPU memory: CUDA_ERROR_INVALID_VALUE",)
    rank.apply(images[1])
    rank.prove_written()


def test_of_tensors_that_are_lent_in_part_only_whole_ones_are_taken(rank: Rank, images: list[Path]) -> None:
    _, lent = lend(images[1])
    name, _, at, size = lent["memories"][0]["ranges"][0]
    lent["memories"][0]["ranges"] = [(name, 0, at, size - 8)]
    held = prepared(rank, images[1], images[0], lent=lent)
    assert set(held.lent.tensors) == {"one.weight"}
    rank.apply(images[1])
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})


def test_tensors_at_odd_addresses_come_from_the_host(rank: Rank, images: list[Path]) -> None:
    _, lent = lend(images[1])
    content = (images[1] / "model.safetensors").read_bytes()
    moved = Lent(0, len(SEAL) + len(content) + 1)
    moved.write(0, SEAL + b"." + content)
    lent["memories"][0].update(handle=moved.handle, ranges=[("model.safetensors", 0, len(SEAL) + 1, len(content))])
    held = prepared(rank, images[1], images[0], lent=lent)
    assert not held.lent.tensors
    rank.apply(images[1])
    rank.prove_written()


def test_a_few_values_are_uploaded_and_need_nothing_that_is_lent(rank: Rank, images: list[Path]) -> None:
    state = load_file(images[0] / "model.safetensors")
    state["one.weight"][3, 3] += 1
    (images[0].parent / "few").mkdir()
    save_file(state, images[0].parent / "few" / "model.safetensors")
    memory, lent = lend(images[0].parent / "few")
    held = prepared(rank, images[0].parent / "few", images[0], lent=lent)
    assert held.made.routes.sources == ()
    spoil(memory)
    rank.apply(images[0].parent / "few")
    rank.prove_written()
    assert weight(rank)[3, 3] == state["one.weight"][3, 3]


class Noted(lent_memory.Memory):
    closed: int = 0

    def close(self) -> None:
        Noted.closed += 1


def borrow_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Noted, "closed", 0)
    patch.setattr("hotweights.adapters.lent.open_memory", lambda device, handle, reader: Noted(handle))


def test_a_refused_image_gives_back_what_was_lent(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lent = lend(images[1])
    borrow_noted(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotweights.adapters.rank.Maker.make", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(rank, images[1], images[0], lent=lent)
    assert Noted.closed == 1
    assert until(rank.release)


def test_what_torch_refuses_to_take_comes_from_the_host(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lent = lend(images[1])
    borrow_noted(monkeypatch)

    def refused(memory: Noted, offset: int, size: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(Noted, "as_array", refused)
    held = prepared(rank, images[1], images[0], lent=lent)
    assert held.made.routes.sources == ("host memory: CUDA error: invalid argument",)
    rank.apply(images[1])
    rank.prove_written()
    assert until(rank.release)
    assert Noted.closed == 1


def test_a_bug_while_borrowing_leaves_nothing_open(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lent = lend(images[1])
    borrow_noted(monkeypatch)
    monkeypatch.setattr("hotweights.adapters.lent._tensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(rank, images[1], images[0], lent=lent)
    assert Noted.closed == 1
    assert not [image for image in images if str(image) in Path("/proc/self/maps").read_text()]


def test_a_lease_begins_when_the_rank_is_told_of_it(
    rank: Rank, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lent = lend(images[1])
    monkeypatch.setattr("hotweights.adapters.rank.memory.require", lambda *args: time.sleep(0.5))
    held = prepared(rank, images[1], images[0], lent={**lent, "left_s": 10.3})
    assert not held.lent.is_readable


def test_on_a_cpu_nothing_is_borrowed(images: list[Path]) -> None:
    rank = Rank(a_worker(images[0], size=WIDTH))
    told = {"device": DEVICE, "handle": bytes(64), "seal": SEAL, "ranges": []}
    held = prepared(rank, images[1], images[0], lent={"left_s": 100.0, "memories": [told]})
    assert held.made.routes.sources == (f"host memory: {DEVICE} is out of reach of cpu",)
    rank.apply(images[1])
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})
    assert torch.equal(weight(rank), load_file(images[1] / "model.safetensors")["one.weight"])
