"""Swaps on vLLM's own model classes, loaded and processed as engines do it, in the ranks of a tensor parallel group.

    torchrun --standalone --nproc-per-node RANKS model_swaps.py FOLDER ARCHITECTURE...

FOLDER/ARCHITECTURE/1 and /2 are checkpoints. One with experts comes first: only its configuration has vLLM make a
group that all of them need. Linear layers stay plain: packed ones have memory that cannot be read.

The live model is loaded from the first checkpoint, another from the second; then an update is prepared as a rank does
it, written and undone. Compared is every tensor that can be reached from the models, through whatever attributes. One
JSON line for each architecture and rank: by which routes, and what was not as it must be.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests import warm
from tests.plain_linear import keep_plain

from hotweights.adapters.fingerprint import fingerprint
from hotweights.adapters.rank import Rank

Tensors = dict[str, torch.Tensor]


def reachable(model: torch.nn.Module) -> Tensors:
    """By the way to it: registered tensors, and those in attributes, containers, closures and plain objects."""
    found: Tensors = {}
    seen: set[int] = set()

    def walk(value: Any, way: str) -> None:
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                found.setdefault(way, value)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, part in _parts(value):
            walk(part, f"{way}.{name}")

    walk(model, "")
    return found


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif getattr(value, "__closure__", None):
        yield from enumerate(cell.cell_contents for cell in value.__closure__)
    elif type(value).__module__.startswith(
        ("vllm.model_executor.layers", "vllm.v1.attention", "vllm.model_executor.models")
    ):
        yield from vars(value).items() if hasattr(value, "__dict__") else ()
    elif isinstance(value, torch.nn.Module):
        yield from vars(value).items()


def copies(tensors: Tensors) -> dict[str, bytes]:
    return {
        way: bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for way, tensor in tensors.items()
    }


def unequal(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(way for way in one.keys() | other.keys() if one.get(way) != other.get(way))


def look_at(rank: Rank, fresh: torch.nn.Module, one: Path, two: Path) -> dict[str, Any]:
    before, after = copies(reachable(rank.model)), copies(reachable(fresh))
    rank.prepare(two, {}, base=one)
    while (held := rank.prepared()) is None:
        time.sleep(0.005)  # what prepares gives way to whoever does not
    routes, expected = held.made.routes, held.expected
    found: dict[str, Any] = {"changed by preparing": unequal(before, copies(reachable(rank.model)))}
    rank.apply(two)
    rank.prove_written()
    found["unlike a fresh model"] = unequal(after, copies(reachable(rank.model)))
    found["expected another fingerprint"] = expected not in (b"", fingerprint(rank.model))
    rank.undo()
    rank.prove_undone()
    found["unlike before"] = unequal(before, copies(reachable(rank.model)))
    del held
    while not rank.release():
        time.sleep(0.005)
    return {"routes": vars(routes), "wrong": found}


def say(architecture: str, rank: int, found: dict[str, Any]) -> None:
    line = json.dumps({"architecture": architecture, "rank": rank, "found": found})
    sys.stdout.write(f"{line}\n")  # in one piece: the ranks share it
    sys.stdout.flush()


def main() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    warm.look_at_classes_here()
    gc.freeze()  # vLLM collects garbage with each model: what is imported is none
    keep_plain()
    torch.accelerator.empty_cache = lambda: None  # of a device, which is not there
    folder, *names = sys.argv[1:]
    os.environ["VLLM_DIST_IDENT"] = f"model-swaps-{os.environ['MASTER_PORT']}"  # as vLLM's executor does it
    number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for at, name in enumerate(names):
        one, two = (Path(folder, name, seed) for seed in "12")
        configs = [
            EngineArgs(
                model=str(checkpoint),
                dtype="bfloat16",
                max_model_len=128,
                skip_tokenizer_init=True,
                enforce_eager=True,
                tensor_parallel_size=ranks,
            ).create_engine_config()
            for checkpoint in (one, two)
        ]
        models: list[torch.nn.Module] = []
        try:
            for config in configs:
                with set_current_vllm_config(config):
                    if not at and not models:
                        init_distributed_environment(ranks, number, "env://", number, "gloo")
                        initialize_model_parallel(ranks, 1)
                    models.append(get_model(vllm_config=config))
        except ImportError as error:  # of a kernel that this version's build has not
            say(name, number, {"cannot be": str(error)})
            continue
        live, fresh = models
        runner = SimpleNamespace(get_model=lambda live=live: live, kv_caches=[])
        worker = SimpleNamespace(
            model_runner=runner, vllm_config=configs[0], model_config=configs[0].model_config, device="cpu"
        )
        try:
            found = look_at(Rank(worker), fresh, one, two)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs into the line of this architecture
            found = {"refused": f"{type(error).__name__}: {error}"}
        say(name, number, found)
        del models, live, fresh, worker, runner
        gc.collect()


if __name__ == "__main__":
    main()
