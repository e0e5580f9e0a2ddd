"""A user's own worker extension in the server: takes failpoints through vLLM's /collective_rpc."""

import os
from typing import Any


class FailpointsByHttp:
    """Beside the plugin's `hotweights_*` methods: one of its own."""

    vllm_config: Any

    def inject_failpoints(self, text: str, engine: int | None = None) -> dict[str, Any]:
        """In every rank, or in those of one data parallel engine."""
        if engine in (None, self.vllm_config.parallel_config.data_parallel_index):
            os.environ["HOTWEIGHTS_FAILPOINTS"] = text
        return {}
