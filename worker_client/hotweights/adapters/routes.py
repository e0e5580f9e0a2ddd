"""vLLM's layerwise reload of some layers: in the live model, or beforehand in a shadow of them.

It keeps storage addresses and re-runs what a layer does with loaded weights: quantisation, packing. Layers are reloaded
whole, with every checkpoint tensor they are made from; the others are not touched.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from hotweights.adapters.components import model_of
from hotweights.adapters.experts import packed_experts
from hotweights.adapters.fingerprint import digest_tensor, is_packed
from hotweights.adapters.mapped import MappedImage
from hotweights.adapters.undo import Copies, Snapshot, objects_of

AfterTensors = Callable[[int], None]
"""Told how much was written in the pause so far, before each tensor and at the end: where tests inject failures."""


class NotWhole(Exception):
    """The apply did not cover the layers; the text names what is missing."""


class NotReproduced(Exception):
    """vLLM's reload of what is installed makes something else than what serves: it is not to be relied on here."""


class Reload:
    """What a window reloads of the live model: the layers, and the copies that bring them back.

    `tensors` names those of the image that the layers are made from; None takes all. `whole` tells that the image has
    the very tensors the model was loaded from, so that a layer that looks only partly loaded is one with padding.
    Without that knowledge such a layer is refused. `must` are the layers that have to be loaded. With a `base`, the
    image that is installed, the first write is rehearsed in the same pause: reloading that has to change nothing.
    """

    def __init__(
        self,
        worker: Any,
        image: MappedImage,
        layers: Collection[torch.nn.Module],
        tensors: Collection[str] | None,
        *,
        whole: bool,
        must: Collection[torch.nn.Module],
        base: MappedImage | None,
    ) -> None:
        for layer in layers:
            if packed_experts(layer) is not None:
                raise NotReproduced(f"the experts of {type(layer).__name__} are packed, which a reload does not do")
            if _gave_away(layer):
                raise NotReproduced(
                    f"something took the weight of a {type(layer).__name__} after it was loaded, as latent attention "
                    "does on a CPU with AMX, and a reload would not give it there"
                )
        for thing in objects_of(layers):
            # Packed from tensors that the reload drops: what computes with it would read freed memory (seen on 0.32).
            if any(type(value).__name__ == "CPUDNNLGEMMHandler" for value in vars(thing).values()):
                raise NotReproduced(f"a {type(thing).__name__} has packed memory that a reload does not keep")
        self._worker, self._image, self._layers = worker, image, layers
        self._tensors, self._whole, self._must, self._base = tensors, whole, must, base
        self._copies = Copies(layers)
        self._before = self.digests()
        self._snapshot: Snapshot | None = None
        self.rehearsed = False
        """Whether reloading the base was seen to change nothing."""

    @property
    def _model(self) -> Any:
        return model_of(self._worker)

    def digests(self) -> dict[str, bytes]:
        """Of the layers' own tensors as they are now, by name."""
        return {
            f"{name}.{own}": digest_tensor(f"{name}.{own}", tensor, threads=1)
            for name, layer in self._model.named_modules()
            if layer in self._layers
            for own, tensor in (*layer._parameters.items(), *layer._buffers.items())
            if tensor is not None
        }

    def is_undone(self) -> bool:
        """Whether every tensor holds what it held when this was made."""
        return self.digests() == self._before

    def write(self, after: AfterTensors) -> None:
        """Leaves the layers half-written when it raises: `undo` is the caller's."""
        self._snapshot = Snapshot(self._model, self._layers)
        if self._base is not None:
            self._reload(self._base, lambda count: None)
            changed = [name for name, digest in self.digests().items() if digest != self._before.get(name)]
            if changed:
                raise NotReproduced(
                    f"loading the version that is said to be installed changes {len(changed)} tensors, first "
                    f"{changed[0]}: another is installed, or vLLM's reload is not to be relied on here; "
                    "HOTWEIGHTS_ROUTE=reload does so all the same"
                )
            self._base, self.rehearsed = None, True
        self._reload(self._image, after)

    def _reload(self, image: MappedImage, after: AfterTensors) -> None:
        layerwise_reload(
            *(self._worker, self._model, image, after, self._layers, self._tensors),
            whole=self._whole,
            must=self._must,
        )

    def undo(self) -> None:
        """Puts everything back, in the reload's books too."""
        from vllm.model_executor.model_loader.reload import layerwise

        if self._snapshot is None:
            return
        self._snapshot.put_back()
        self._copies.put_back()
        for layer in self._layers:
            layerwise.get_layerwise_info(layer).reset()
        layerwise.LOADING_LAYERS.clear()
        self._snapshot = None


class _Only:
    """Some layers of a model, as the reload goes through them."""

    def __init__(self, layers: Collection[torch.nn.Module]) -> None:
        self._layers = layers

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(self._layers)


def _gave_away(layer: torch.nn.Module) -> bool:
    """Whether an unquantised layer has an empty weight, and has not packed it for itself (seen on 0.32).

    vLLM's reload puts a whole weight into the place of the empty one, and fails.
    """
    weight = layer._parameters.get("weight")
    is_plain = type(getattr(layer, "quant_method", None)).__name__ == "UnquantizedLinearMethod"
    return is_plain and weight is not None and not weight.numel() and not is_packed(layer)


@torch.no_grad()
def layerwise_reload(
    worker: Any,
    model: Any,
    image: MappedImage,
    after: AfterTensors,
    layers: Collection[torch.nn.Module],
    tensors: Collection[str] | None,
    *,
    whole: bool,
    must: Collection[torch.nn.Module],
) -> None:
    """vLLM's own reload of these layers of `model`, which is the worker's or a shadow of it.

    Raises NotWhole, where one of those that `must` be loaded is not too, and what loaders raise.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    wanted = len(image) if tensors is None else len(tensors)
    only, consumed = _Only(layers), [0]
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(only)
        loaded = model.load_weights(_counted(image, tensors, consumed, after))
        after(consumed[0])
        if consumed[0] != wanted:
            raise NotWhole(f"the model took {consumed[0]} of {wanted} tensors")
        for layer in must:
            if _was_not_loaded(layer):
                raise NotWhole(f"a {type(layer).__name__} got no value at all")
        stale: list[Any] = [layer for layer in layers if _was_not_loaded(layer)]
        if not whole:
            _check_whole(model, layers, loaded if tensors is None else None)
        finalize_layerwise_reload(only, worker.model_config)
        for layer in stale:
            # A tied layer is not loaded itself, so the reload leaves its packed copy of the old weights.
            if layer.__dict__.get("cpu_linear") is not None:
                layer.quant_method.process_weights_after_loading(layer)


def _counted(
    image: MappedImage, tensors: Collection[str] | None, consumed: list[int], after: AfterTensors
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in image:
        if tensors is None or name in tensors:
            after(consumed[0])
            consumed[0] += 1
            yield name, tensor


def _was_not_loaded(layer: torch.nn.Module) -> bool:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(layer)
    return bool(info.can_load() and info.load_numel <= 0 and info.load_numel_total)


def _check_whole(model: Any, layers: Collection[torch.nn.Module], loaded: set[str] | None) -> None:
    """Refuses layers loaded in part: vLLM would process them over uninitialised memory (FACTS)."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        padded = hasattr(layer, "num_embeddings_padded")
        in_part = info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0)
        if layer in layers and in_part and not padded:
            raise NotWhole(f"layer {name} got {info.load_numel} of {info.load_numel_total} values")
    if loaded is not None:
        missing = sorted({name for name, _ in model.named_parameters()} - loaded)
        if missing:
            raise NotWhole(f"{len(missing)} parameters were not loaded, first {missing[0]}")
