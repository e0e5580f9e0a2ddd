"""A user's own worker extension: lets a test set failpoints and spoil things in the worker's process."""

import os
from typing import Any

import torch

from hotweights.adapters.vllm_extension import HotweightsWorkerExtension

if os.environ.get("TEST_PLAIN_LINEAR"):
    from tests.plain_linear import keep_plain

    keep_plain()


class FailpointExtension(HotweightsWorkerExtension):
    """Beside the `hotweights_*` methods: some of its own."""

    def inject_failpoints(self, text: str, rank: int | None = None) -> dict[str, Any]:
        if rank in (None, self.rank):
            os.environ["HOTWEIGHTS_FAILPOINTS"] = text
        return {}

    def inject_route(self, name: str) -> dict[str, Any]:
        os.environ["HOTWEIGHTS_ROUTE"] = name
        return {}

    def inject_friend(self, there: bool) -> dict[str, Any]:
        """A module, of no model, that is reached by an attribute: nothing says where a loader may walk to."""
        layers = list(self.model_runner.get_model().modules())
        if there:
            layers[0].__dict__["friends"] = [torch.nn.Linear(1, 1)]
        else:
            del layers[0].__dict__["friends"]
        return {}

    def forget_plans(self) -> dict[str, Any]:
        from hotweights.adapters.plans import Plans

        self._hotweights_rank._plans = Plans()
        return {}

    def spoil_write(self, packed: bool) -> dict[str, Any]:
        """Has one write write something else than what it was made for."""
        from hotweights.adapters.writes import Function

        class Idle(Function):
            def write(self) -> None:
                pass

        writes = self._hotweights_rank._prepared.made.update.writes
        at = next(at for at, write in enumerate(writes) if isinstance(write, Function) == packed)
        if packed:
            writes[at] = Idle(writes[at].layer, writes[at].name, writes[at].new, writes[at].old)
        else:
            writes[at]._pairs[0][1].view(-1)[0] += 1
        return {}

    def spoil_live(self, name: str) -> dict[str, Any]:
        """Changes one value of a tensor that serves."""
        self.model_runner.get_model().get_parameter(name).data.view(-1)[0] += 1
        return {}

    def mark_caches(self, value: float) -> dict[str, Any]:
        for cache in self.model_runner.kv_caches:
            cache.fill_(value)
        return {"sum": self.sum_of_caches()}

    def sum_of_caches(self) -> float:
        return float(sum(cache.double().sum() for cache in self.model_runner.kv_caches))

    def packed_layer_count(self) -> int:
        from hotweights.adapters.fingerprint import packed_layers

        return len(list(packed_layers(self.model_runner.get_model())))

    def shadow_is_gone(self) -> bool:
        """Whether nothing of an assembled model is left: no modules, no entries in the reload's books."""
        import gc

        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        gc.collect()
        live = set(self.model_runner.get_model().modules())
        kinds = {type(layer) for layer in live}
        modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module) and type(thing) in kinds]
        return set(modules) <= live and set(LAYERWISE_INFO) <= live
