"""The worker's side of benchmarks.swap: chooses the route of the next preparation in the worker's process."""

import os
from typing import Any

from hotweights.adapters.vllm_extension import HotweightsWorkerExtension


class RouteExtension(HotweightsWorkerExtension):
    """Beside the `hotweights_*` methods: one that sets HOTWEIGHTS_ROUTE, which is read at each preparation."""

    def benchmark_route(self, name: str) -> dict[str, Any]:
        os.environ["HOTWEIGHTS_ROUTE"] = name
        return {}
