"""`HotweightsWorkerExtension`: a vLLM `worker_extension_cls`, and a handle for any torch module."""

from typing import Any

from hotweights.adapters.vllm_worker import METHODS


class HotweightsWorkerExtension:
    """As `worker_extension_cls` it lends a worker the `hotweights_*` methods.

    They are no attributes of the class: vLLM asserts that an extension brings nothing the worker has, and the plugin
    may have set them on the worker already. Found through `__getattr__`, two ways at once do no harm.
    """

    def __getattr__(self, name: str) -> Any:
        method = METHODS.get(name)
        if method is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return method.__get__(self)
