"""Of what kind a rank is: ranks of one kind that hold the same image have the same fingerprint.

Whatever decides names, shapes, types and bytes of what is installed, short of the weights, goes in. Ranks that differ
in something that would not have mattered are only not compared; too little in here, and an update of healthy replicas
would be taken back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

KIND_BYTES = 8
# Of a checkpoint's config: where it lies and who saved it, not what it is.
_OF_THE_FOLDER = {"_name_or_path", "name_or_path", "transformers_version"}
_OF_THE_CPU = {"model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features"}
_CPUINFO = Path("/proc/cpuinfo")


def kind(worker: Any) -> str:
    """16 hex digits for a vLLM worker; empty for one whose experts move while it serves."""
    if getattr(worker.vllm_config.parallel_config, "enable_eplb", False):
        return ""
    return digest(facts(worker))


def digest(said: Mapping[str, Any]) -> str:
    """The same for the same facts, in whatever order they come."""
    text = json.dumps(said, sort_keys=True, default=str)
    return blake3(text.encode()).hexdigest(length=KIND_BYTES)


def facts(worker: Any) -> dict[str, Any]:
    """What decides how the worker holds an image."""
    import torch
    import vllm

    from hotweights.adapters.components import Together, model_of
    from hotweights.adapters.fingerprint import live_tensors

    config = worker.vllm_config
    model, parallel = config.model_config, config.parallel_config
    serving = model_of(worker)
    draft = config.speculative_config.draft_model_config.hf_config if isinstance(serving, Together) else None
    return {
        "model": without_folder(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "data_parallel": parallel.data_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device(torch.device(worker.device)),
        # Adapters, parts left out and backends name and lay out tensors in their own ways.
        "tensors": sorted(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in live_tensors(serving)),
        **({} if draft is None else {"draft": without_folder(draft.to_dict())}),
    }


def without_folder(config: Any) -> Any:
    """A checkpoint's config, and those inside it, without what says where it came from."""
    if isinstance(config, Mapping):
        return {str(key): without_folder(value) for key, value in config.items() if key not in _OF_THE_FOLDER}
    return [without_folder(value) for value in config] if isinstance(config, list | tuple) else config


def device(of: Any) -> list[str]:
    """What a `torch.device` is, as far as it decides the bits of an answer."""
    import torch

    if of.type == "cuda":
        return [of.type, torch.cuda.get_device_name(of)]
    if of.type == "cpu":
        # Packed layers are proven by what they answer, and more threads may add up in another order.
        return [of.type, *cpu(_CPUINFO), f"{torch.get_num_threads()} threads"]
    return [of.type]


def cpu(cpuinfo: Path) -> list[str]:
    """What the first processor is called and what it can do; nothing where the system does not tell."""
    if not cpuinfo.exists():
        return []
    first = cpuinfo.read_text().partition("\n\n")[0]
    return sorted(line for line in first.splitlines() if line.partition(":")[0].strip() in _OF_THE_CPU)
