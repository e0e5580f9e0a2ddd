"""`HotweightsWorkerExtension`: a vLLM `worker_extension_cls`, and a handle for any torch module.

Importing it loads neither torch nor vLLM nor grpc.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotweights.adapters.vllm_worker import METHODS

if TYPE_CHECKING:
    import torch

    from hotweights.worker_client.config import Config

UPDATE_DEADLINE_S = 600.0


class NotBound(RuntimeError):
    """`apply_update` was called before `bind_module`."""

    def __init__(self) -> None:
        super().__init__("no module is bound: call bind_module(module) first")


@dataclass(frozen=True)
class AppliedUpdate:
    """What `apply_update` installed."""

    version: str
    """Its name; empty when it came from a folder."""
    digest: bytes
    """Its manifest's digest; empty when it came from a folder."""
    fingerprint: bytes
    """Of the live tensors after the write."""


class HotweightsWorkerExtension:
    """As `worker_extension_cls` it lends a worker the `hotweights_*` methods; `__init__` never runs then.

    They are no attributes of the class: vLLM asserts that an extension brings nothing the worker has, and the plugin
    may have set them on the worker already. Found through `__getattr__`, two ways at once do no harm.

    As a plain object it updates a module of your own:

        extension = HotweightsWorkerExtension(endpoint="tcp://127.0.0.1:5555")
        extension.bind_module(module)
        extension.apply_update()
    """

    def __init__(
        self, endpoint: str | None = None, model: str | None = None, name_map: Mapping[str, str] | None = None
    ) -> None:
        """What is None is taken from the environment when it is needed."""
        self._endpoint = endpoint
        self._model = model
        self._name_map = name_map
        self._module: torch.nn.Module | None = None

    def __getattr__(self, name: str) -> Any:
        method = METHODS.get(name)
        if method is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return method.__get__(self)

    def bind_module(self, module: "torch.nn.Module") -> None:
        """The module whose tensors `apply_update` replaces."""
        self._module = module

    def apply_update(
        self,
        folder: Path | str | None = None,
        *,
        check_finite: bool = False,
        deadline_s: float = UPDATE_DEADLINE_S,
    ) -> AppliedUpdate:
        """Installs the newest version of the model, or the checkpoint in `folder`; all of it or nothing.

        The newest version is asked of the coordinator and staged by the node's agent, which is started when none runs.
        No forward pass may run meanwhile. `check_finite` refuses weights with NaN or infinite values. Raises NotBound,
        BadImage, Mismatch, NotFinite, Refused, Unreachable, TimeoutError; the module then serves what it did before.
        Not from a running event loop: use a thread there.
        """
        from hotweights.adapters.torch_module import install

        if self._module is None:
            raise NotBound
        module, config = self._module, self._config()
        if folder is not None:
            proof = install(module, Path(folder), config.name_map, check_finite=check_finite)
            return AppliedUpdate("", b"", proof)
        from hotweights.adapters.newest import pull_newest

        def write(image: Path) -> bytes:
            return install(module, image, config.name_map, check_finite=check_finite)

        pulled = asyncio.run(asyncio.wait_for(pull_newest(config, write), deadline_s))
        return AppliedUpdate(pulled.version, pulled.digest, pulled.fingerprint)

    def _config(self) -> "Config":
        from hotweights.adapters.settings import settings

        return settings(self._endpoint, self._model, self._name_map)
