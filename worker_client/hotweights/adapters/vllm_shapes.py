"""Which shapes of vLLM engines can follow updates, and one line about each that cannot."""

import multiprocessing
import sys
from typing import Any

# KV connectors that drop what they keep when vLLM resets its caches, and those that keep nothing between requests.
_RESETTABLE = {"OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector"}
_TRANSFER_ONLY = {
    *("NixlConnector", "NixlPullConnector", "NixlPushConnector", "P2pNcclConnector"),
    *("MooncakeConnector", "MoRIIOConnector", "DecodeBenchConnector"),
}


def unsupported(front_end: Any) -> str:
    """Why this engine cannot follow updates; empty when it can. `front_end` is an AsyncLLM or an LLMEngine."""
    return _unsupported_parallel(front_end) or _outside_caches(front_end.vllm_config)


def _outside_caches(config: Any) -> str:
    """Why what was computed with old weights would outlive them outside of the engine; or empty."""
    names = _connectors(config.kv_transfer_config)
    if unknown := sorted(set(names) - _RESETTABLE - _TRANSFER_ONLY):
        return f"its KV connector {', '.join(unknown)} would serve what old weights computed: vLLM cannot clear it"
    if getattr(config, "ec_transfer_config", None) is not None:
        return "its encoder cache connector would serve what old weights computed: vLLM cannot clear it"
    return ""


def _connectors(transfer: Any) -> list[str]:
    """The names of the KV connectors, those behind a MultiConnector for itself."""
    if transfer is None or transfer.kv_connector is None:
        return []
    if transfer.kv_connector != "MultiConnector":
        return [transfer.kv_connector]
    behind = transfer.kv_connector_extra_config.get("connectors", [])
    return [str(one.get("kv_connector")) for one in behind]


def _unsupported_parallel(front_end: Any) -> str:
    parallel = front_end.vllm_config.parallel_config
    if not hasattr(front_end.engine_core, "core_engines"):
        return (
            "it runs in its owner's own thread (VLLM_ENABLE_V1_MULTIPROCESSING=0), where nothing can be done beside it"
        )
    if getattr(parallel, "nnodes", 1) > 1:
        return f"its ranks are on {parallel.nnodes} nodes; one is supported"
    if parallel.data_parallel_size > 1:
        return _unsupported_data_parallel(front_end, parallel)
    if "ray" in (parallel.distributed_executor_backend, parallel.data_parallel_backend):
        return "its ranks belong to Ray; the multiprocessing executor is supported"
    return ""


def _unsupported_data_parallel(front_end: Any, parallel: Any) -> str:
    """All engines of a data parallel server form one replica, so this front end must reach every one of them."""
    if front_end.vllm_config.model_config.is_moe:
        # Its engines step together: one that rests while another steps on blocks both for ever.
        return "data parallel engines of an expert model are not supported; tensor parallel ones are"
    if parallel.data_parallel_backend == "ray":
        return "its data parallel engines belong to Ray; the multiprocessing backend is supported"
    if len(front_end.engine_core.core_engines) != parallel.data_parallel_size:
        return (
            "its data parallel engines are behind other front ends (an external or hybrid load balancer, or offline "
            "data parallel); the internal load balancer is supported"
        )
    local = parallel.data_parallel_size_local
    if local != parallel.data_parallel_size:
        return (
            f"{parallel.data_parallel_size - local} of its data parallel engines are on other nodes; one is supported"
        )
    return ""


def no_front_end() -> str:
    """Why this process, the first of a server, will have no front end that could follow updates; or empty."""
    if multiprocessing.parent_process() is not None:
        return ""
    if "--headless" in sys.argv[1:]:
        return "with --headless there is no front end here; the engines belong to a server elsewhere"
    from vllm import envs

    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return "the Rust front end is not supported; unset VLLM_USE_RUST_FRONTEND"
    return ""
