"""A user's own worker extension: lets a test set failpoints in the worker's process."""

import os
from typing import Any

from hotweights.adapters.vllm_extension import HotweightsWorkerExtension


class FailpointExtension(HotweightsWorkerExtension):
    """Beside the `hotweights_*` methods: one of its own."""

    def inject_failpoints(self, text: str) -> dict[str, Any]:
        os.environ["HOTWEIGHTS_FAILPOINTS"] = text
        return {}
