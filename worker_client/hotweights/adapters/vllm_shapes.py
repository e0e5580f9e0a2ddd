"""Which shapes of vLLM engines can follow updates, and one line about each that cannot."""

import multiprocessing
import sys
from typing import Any


def unsupported(front_end: Any) -> str:
    """Why this engine cannot follow updates; empty when it can. `front_end` is an AsyncLLM or an LLMEngine."""
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
