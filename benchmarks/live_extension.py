"""The worker's side of benchmarks on a live engine."""

import os
import time
from typing import Any

from hotweights.adapters.vllm_extension import HotweightsWorkerExtension

if os.environ.get("BENCHMARK_PLAIN_LINEAR"):
    from tests.plain_linear import keep_plain

    keep_plain()


class BenchmarkExtension(HotweightsWorkerExtension):
    """Beside the `hotweights_*` methods: some of its own."""

    benchmark_buffers: tuple[Any, ...]

    def benchmark_route(self, name: str) -> dict[str, Any]:
        """Sets HOTWEIGHTS_ROUTE, which is read at each preparation."""
        os.environ["HOTWEIGHTS_ROUTE"] = name
        return {}

    def benchmark_memcpy(self, size: int) -> dict[str, Any]:
        """Seconds of a copy of `size` bytes between two buffers that were written to before."""
        import torch

        if not hasattr(self, "benchmark_buffers") or self.benchmark_buffers[0].numel() != size:
            self.benchmark_buffers = tuple(torch.full((size,), value, dtype=torch.uint8) for value in (1, 2))
        self.benchmark_buffers = self.benchmark_buffers[::-1]
        begun = time.perf_counter()
        self.benchmark_buffers[0].copy_(self.benchmark_buffers[1])
        return {"seconds": time.perf_counter() - begun}
