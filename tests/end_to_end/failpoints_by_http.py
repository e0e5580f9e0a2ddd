"""A user's own worker extension in the server: takes failpoints through vLLM's /collective_rpc."""

import os
from typing import Any


class FailpointsByHttp:
    """Beside the plugin's `hotweights_*` methods: one of its own."""

    def inject_failpoints(self, text: str) -> dict[str, Any]:
        os.environ["HOTWEIGHTS_FAILPOINTS"] = text
        return {}
