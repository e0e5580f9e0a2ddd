"""How tensors of an image get into a model: `reload` here, `assembled` in the module of that name.

A route may leave the model half-written when it raises: the undo is the caller's.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from hotweights.adapters.fingerprint import Proof
from hotweights.adapters.mapped import MappedImage

AfterTensors = Callable[[int], None]
"""Told how much was written in the pause so far, before each tensor and at the end: where tests inject failures."""


class NotWhole(Exception):
    """The apply did not cover the model; the text names what is missing."""


class Route(Protocol):
    """Writes an image into a model."""

    name: str
    proof: Proof | None
    """The fingerprint that the write will give, and the probe of layers packed already; None when nobody knows."""

    def write(self, image: MappedImage, after: AfterTensors) -> None:
        """Writes all of it. Raises NotWhole, and whatever a loader raises."""

    def keep(self) -> bool:
        """Calls off what `written` began. False when that is done: there is nothing to write, prepare again."""

    def clean_up(self) -> None:
        """After an undo: forgets what a failed write left behind outside the model's modules."""

    def written(self) -> None:
        """The write was proven: frees, a little later and in another thread, what only the write needed."""

    def close(self) -> None:
        """Frees everything. Not for inside the pause."""


class ReloadRoute:
    """vLLM's layerwise reload: keeps storage addresses, re-runs quantisation and packing.

    `whole` tells that the image has the very tensors the model was loaded from, so that a layer that looks only
    partly loaded is one with padding. Without that knowledge such a layer is refused.
    """

    name = "reload"
    proof: Proof | None = None

    def __init__(self, worker: Any, *, whole: bool) -> None:
        self._worker = worker
        self._whole = whole

    @property
    def _model(self) -> Any:
        return self._worker.model_runner.get_model()

    def write(self, image: MappedImage, after: AfterTensors) -> None:
        layerwise_reload(self._worker, self._model, image, after, whole=self._whole)

    def keep(self) -> bool:
        return True

    def clean_up(self) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        for layer in self._model.modules():
            layerwise.get_layerwise_info(layer).reset()
        layerwise.LOADING_LAYERS.clear()

    def written(self) -> None:
        pass

    def close(self) -> None:
        pass


@torch.no_grad()
def layerwise_reload(worker: Any, model: Any, image: MappedImage, after: AfterTensors, *, whole: bool) -> None:
    """vLLM's own reload of `model`, which is the worker's or a shadow of it. Raises NotWhole and what loaders raise."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    consumed = [0]
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(_counted(image, consumed, after))
        after(consumed[0])
        if consumed[0] != len(image):
            raise NotWhole(f"the model took {consumed[0]} of {len(image)} tensors")
        stale = [layer for layer in model.modules() if _shares_but_was_not_loaded(layer)]
        if not whole:
            _check_whole(model, loaded)
        finalize_layerwise_reload(model, worker.model_config)
        for layer in stale:
            # A tied layer is not loaded itself, so the reload leaves its packed copy of the old weights.
            if layer.__dict__.get("cpu_linear") is not None:
                layer.quant_method.process_weights_after_loading(layer)


def _counted(image: MappedImage, consumed: list[int], after: AfterTensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in image:
        after(consumed[0])
        consumed[0] += 1
        yield name, tensor


def _shares_but_was_not_loaded(layer: torch.nn.Module) -> bool:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(layer)
    return bool(info.can_load() and info.load_numel <= 0 and info.load_numel_total)


def _check_whole(model: Any, loaded: set[str] | None) -> None:
    """Refuses layers loaded in part: vLLM would process them over uninitialised memory (FACTS)."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        padded = hasattr(layer, "num_embeddings_padded")
        if info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0) and not padded:
            raise NotWhole(f"layer {name} got {info.load_numel} of {info.load_numel_total} values")
    if loaded is not None:
        missing = sorted({name for name, _ in model.named_parameters()} - loaded)
        if missing:
            raise NotWhole(f"{len(missing)} parameters were not loaded, first {missing[0]}")
