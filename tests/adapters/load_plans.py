"""Load plans on vLLM's own model classes, in the ranks of a tensor parallel group and without an engine.

    torchrun --standalone --nproc-per-node RANKS load_plans.py FOLDER ARCHITECTURE...

FOLDER/ARCHITECTURE/1 and /2 are checkpoints. One with experts comes first: only its configuration has vLLM make a
group that all of them need.

Loads the first checkpoint by the model's own loader, records the plan, and writes the second one by the plan and
then by the loader. One JSON line for each architecture and rank: what of that was not as it must be.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hotweights.adapters.load_plan import LoadPlan, record
from hotweights.adapters.mapped import MappedImage


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def replay(plan: LoadPlan, model: torch.nn.Module, image: dict[str, torch.Tensor]) -> None:
    live = dict(model.named_parameters(remove_duplicate=False))
    for copy in plan.copies:
        copy.put.of(live[copy.parameter].data).copy_(copy.take.of(image[copy.tensor]))


def look_at(model: Any, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.data.fill_(7)  # what a loader leaves out is seen
    model.load_weights(iter(one.items()))
    before = parameters(model)
    plan = record(model, one)
    found = {
        "copies": len(plan.copies),
        "opaque": plan.opaque,
        "changed by recording": unequal(before, parameters(model)),
        "differing": plan.differing(model, one),
        "took another image for this": not plan.differing(model, two),
        "another plan of the second image": plan != record(model, two),
    }
    replay(plan, model, two)
    by_plan = parameters(model)
    model.load_weights(iter(two.items()))
    return {**found, "unlike the loader": unequal(by_plan, parameters(model))}


@contextmanager
def bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    folder, *names = sys.argv[1:]
    os.environ["VLLM_DIST_IDENT"] = f"load-plans-{os.environ['MASTER_PORT']}"  # as vLLM's executor does it
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, name in enumerate(names):
        one, two = (Path(folder, name, seed) for seed in "12")
        config = EngineArgs(
            model=str(one), dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True, tensor_parallel_size=ranks
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not number:
                init_distributed_environment(ranks, rank, "env://", rank, "gloo")
                initialize_model_parallel(ranks, 1)
            with bfloat16():
                model = initialize_model(config)
            images = [dict(MappedImage(checkpoint, {})) for checkpoint in (one, two)]
            line = json.dumps({"architecture": name, "rank": rank, "found": look_at(model, *images)})
            sys.stdout.write(f"{line}\n")  # in one piece: the ranks share it
            sys.stdout.flush()


if __name__ == "__main__":
    main()
