"""A plain module in vLLM's place, with what a rank asks of a vLLM worker."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from hotweights.adapters.rank import Rank

DEADLINE_S = 10.0


class Model(torch.nn.Module):
    """Two matrices, loaded by their names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(size, size, bias=False), torch.nn.Linear(size, size, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        for name, tensor in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
        return {name for name, _ in self.named_parameters()}


def an_image(folder: Path, seed: int, size: int = 64) -> Path:
    torch.manual_seed(seed)
    folder.mkdir()
    save_file({name: torch.randn(size, size) for name in ("one.weight", "two.weight")}, folder / "model.safetensors")
    return folder


def a_worker(image: Path, device: str = "cpu", size: int = 64) -> Any:
    """That serves the image."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from hotweights.adapters.mapped import MappedImage

    model = Model(size).to(device)
    record_metadata_for_reloading(model)
    with torch.no_grad():
        model.load_weights(MappedImage(image, {}))
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(local_world_size=1, world_size=1),
        lora_config=None,
    )
    runner = SimpleNamespace(get_model=lambda: model, kv_caches=[])
    return SimpleNamespace(
        model_runner=runner,
        vllm_config=config,
        model_config=SimpleNamespace(model=str(image), dtype=torch.float32),
        device=device,
    )


def weight(rank: Rank) -> torch.Tensor:
    return rank.model.get_parameter("one.weight").data


def until(done: Callable[[], Any]) -> Any:
    ends = time.monotonic() + DEADLINE_S
    while not (found := done()):
        assert time.monotonic() < ends
        time.sleep(0.005)
    return found


def prepared(rank: Rank, image: Path, base: Path | None, **more: Any) -> Any:
    rank.prepare(image, {}, base=base, **more)
    return until(rank.prepared)
