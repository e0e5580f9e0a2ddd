"""A rank on a real GPU, over a plain module in vLLM's place; what it borrows comes from another process."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.adapters.plain_worker import a_worker, an_image, prepared, until, weight  # noqa: E402

from hotweights.adapters.fingerprint import fingerprint  # noqa: E402
from hotweights.adapters.rank import Rank  # noqa: E402
from hotweights.adapters.torch_module import same_as_folder  # noqa: E402
from hotweights.adapters.update import NotProven  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WIDTH = 4096
LENDING = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from hotweights.publish.lending import DeviceCopy
weights = Path(sys.argv[1])
copy = DeviceCopy({name: tensor.cuda() for name, tensor in load_file(weights).items()}, weights)
print(copy.memories[0].SerializeToString().hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("images")
    made = [an_image(home / f"v{seed}", seed, WIDTH) for seed in (1, 2)]
    few = {name: tensor.clone() for name, tensor in load_file(made[0] / "model.safetensors").items()}
    few["one.weight"].view(-1)[torch.randperm(WIDTH * WIDTH)[: WIDTH * WIDTH // 100]] += 1
    (home / "few").mkdir()
    save_file(few, home / "few" / "model.safetensors")
    return [*made, home / "few"]


@pytest.fixture
def rank(images: list[Path]) -> Rank:
    return Rank(a_worker(images[0], "cuda", WIDTH))


@pytest.mark.parametrize("budget", ["0", "2000000", "", "99000000000"])
@pytest.mark.parametrize("target", [1, 2], ids=["full", "one percent"])
def test_it_goes_there_and_back(
    rank: Rank, images: list[Path], target: int, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_DEVICE_BUDGET", budget)
    address = weight(rank).data_ptr()
    held = prepared(rank, images[target], images[0])
    assert held.made.routes.direct == (2, 2 * WIDTH * WIDTH * 4)
    before = fingerprint(rank.model)
    assert held.before == before
    rank.apply(images[target])
    rank.prove_written()
    assert fingerprint(rank.model) == held.expected != before
    assert same_as_folder(rank.model, images[target], {})
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before
    rank.apply(images[target])
    rank.prove_written()
    assert rank.retain(images[0])
    prepared(rank, images[0], None)
    rank.apply(images[0])
    rank.prove_written()
    assert fingerprint(rank.model) == before
    assert weight(rank).data_ptr() == address
    assert until(rank.release)


@pytest.mark.parametrize("target", [1, 2], ids=["full", "one percent"])
def test_what_was_spoilt_on_the_device_is_not_proven(rank: Rank, images: list[Path], target: int) -> None:
    held = prepared(rank, images[target], images[0])
    rank.apply(images[target])
    one, other = (load_file(images[at] / "model.safetensors")["one.weight"] for at in (0, target))
    row, column = (one != other).nonzero()[0]
    weight(rank)[row, column] += 1
    with pytest.raises(NotProven):
        rank.prove_written()
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == held.before


@pytest.fixture
def lender(images: list[Path]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", LENDING, str(images[1] / "model.safetensors")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.parametrize("end", ["", "killed before", "killed after"])
def test_another_process_lends_what_is_written(
    rank: Rank, images: list[Path], lender: "subprocess.Popen[str]", end: str
) -> None:
    from hotweights.v1 import agent_service_pb2
    from hotweights.worker_client.window.prepare import _plain

    assert lender.stdout is not None
    told = agent_service_pb2.DeviceMemory.FromString(bytes.fromhex(lender.stdout.readline()))
    assert len(told.ranges) == 1
    if end == "killed before":
        lender.kill()
        lender.wait(60)
    lent = {"left_s": 100.0, "memories": [_plain(told)]}
    held = prepared(rank, images[1], images[0], lent=lent)
    if end == "killed before":
        assert held.made.routes.sources[0].startswith("host memory: borrowing GPU memory: CUDA_ERROR")
    else:
        assert held.made.routes.sources == (f"cuda-ipc: 128 MiB of {told.device_uuid} of another process",)
    if end == "killed after":
        lender.kill()
        lender.wait(60)
    before = fingerprint(rank.model)
    rank.apply(images[1])
    rank.prove_written()
    assert same_as_folder(rank.model, images[1], {})
    rank.undo()
    rank.prove_undone()
    assert fingerprint(rank.model) == before
    assert until(rank.release)
