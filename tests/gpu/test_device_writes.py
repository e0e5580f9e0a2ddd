"""Writes into the memory of a real GPU."""

import pytest

torch = pytest.importorskip("torch")

from hotweights.adapters.device_writes import device_write  # noqa: E402
from hotweights.adapters.placed import Budget  # noqa: E402
from hotweights.adapters.writes import difference, proof_of  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
]

SIZE = 4 << 20
BUDGETS = {"all on the device": 1 << 40, "nothing on the device": 0, "the places on the device": SIZE // 100 * 8}


@pytest.mark.parametrize("share", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_write_goes_there_and_back_bit_for_bit_at_the_same_address(share: float, budget: int) -> None:
    torch.manual_seed(1)
    before = torch.randn(SIZE).to(torch.bfloat16)
    new = before.clone()
    new[torch.randperm(SIZE)[: int(SIZE * share)]] += 1
    live = before.cuda()
    address = live.data_ptr()
    found = difference(before.clone().untyped_storage(), new.untyped_storage(), 2)
    assert found is not None
    write = device_write(live.untyped_storage(), found, Budget(budget))
    for _ in range(2):
        write.write()
        torch.cuda.synchronize()
        assert torch.equal(live.cpu().view(torch.int16), new.view(torch.int16))
        assert write.proof() == write.new_proof
        write.undo()
        torch.cuda.synchronize()
        assert torch.equal(live.cpu().view(torch.int16), before.view(torch.int16))
        assert write.proof() == write.old_proof
    assert live.data_ptr() == address


def test_a_proof_is_the_same_on_the_device_and_on_the_host() -> None:
    data = torch.randint(0, 256, (3 * 32768 + 5,), dtype=torch.uint8)
    assert proof_of(data.cuda()) == proof_of(data)


def test_a_graph_that_was_captured_before_computes_with_what_was_written() -> None:
    before = torch.randn(256, 256)
    new = before + 1
    live = before.cuda()
    x, y = torch.ones(1, 256, device="cuda"), torch.empty(1, 256, device="cuda")
    torch.mm(x, live, out=y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(x, live, out=y)
    found = difference(before.untyped_storage(), new.untyped_storage(), 4)
    assert found is not None
    device_write(live.untyped_storage(), found, Budget(1 << 40)).write()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, torch.mm(x, new.cuda()))
