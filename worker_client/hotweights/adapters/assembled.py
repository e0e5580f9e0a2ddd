"""The route that keeps the pause short: everything is assembled before it, the pause copies and hands over.

    prepare (serving)   vLLM's layerwise reload of a shadow: reading, fusing, packing, in one thread
            (serving)   the fingerprint of the shadow, which the engine must have after the write
    apply   (paused)    changed bytes into the live storages, functions of packed layers onto the live layers

Packing beside the engine is safe: it touches nothing but the new handler, whereas running a packed layer uses a
scratchpad that all layers share (vLLM's csrc/cpu/dnnl_helper.cpp). So the probe is left to the engine's loop.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hotweights.adapters.fingerprint import Probe, Proof, digest_tensors
from hotweights.adapters.mapped import MappedImage
from hotweights.adapters.routes import AfterTensors, layerwise_reload
from hotweights.adapters.shadow import NoShadow, Shadow, Write

FREE_AFTER_S = 1.0  # by then the window is over: giving memory back to the system takes tens of ms a GB


class AssembledRoute:
    """Made in the thread that prepares. Raises NoShadow, NotWhole, and what a loader raises."""

    name = "assembled"

    def __init__(self, worker: Any, image: MappedImage, *, whole: bool) -> None:
        if worker.vllm_config.lora_config is not None:
            raise NoShadow("the engine serves LoRA adapters")
        shadow = Shadow(worker.model_runner.get_model())
        try:
            layerwise_reload(worker, shadow.model, image, lambda count: None, whole=whole)
            self._writes: list[Write] | None = shadow.writes()
            self.proof: Proof | None = Proof(digest_tensors(shadow.model, threads=1), Probe(shadow.model))
        except Exception:
            shadow.forget()
            raise
        self._shadow: Shadow | None = shadow
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    @torch.no_grad()
    def write(self, image: MappedImage, after: AfterTensors) -> None:
        writes = self._writes
        if writes is None:
            raise NoShadow("what was assembled was given back; prepare again")
        for count, write in enumerate(writes):
            after(count)
            write.write()
        after(len(writes))

    def keep(self) -> bool:
        with self._lock:
            self._timer = None
            return self._writes is not None

    def clean_up(self) -> None:
        """A failed write leaves nothing outside the model."""

    def written(self) -> None:
        with self._lock:
            self._timer = threading.Timer(FREE_AFTER_S, self._close_unless_kept)
            self._timer.daemon = True
            self._timer.start()

    def _close_unless_kept(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._close()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._timer = self._writes = self.proof = None
        shadow, self._shadow = self._shadow, None
        if shadow is not None:
            shadow.forget()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch and oneDNN on one thread here, which leaves the cores to the serving engine.

    The number belongs to the calling thread; only one that never ran anything in parallel yet takes over the last set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
