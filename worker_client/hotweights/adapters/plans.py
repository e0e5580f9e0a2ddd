"""The load plan of one rank's model: recorded once, proven with the version that is installed, kept while both hold.

It is for one model config, parallel config and vLLM (those of this process) and for one layout of images: names, shapes
and dtypes. Another layout, or a model made of other tensors, has it recorded anew; weights that changed other than by
an update have it proven anew.
"""

import logging
from pathlib import Path

import torch

from hotweights.adapters.components import NotTogether, Together
from hotweights.adapters.direct import Split, nothing_direct, split
from hotweights.adapters.load_plan import Form, LoadPlan, NotRecorded, form, named_tensors, record_beside
from hotweights.adapters.mapped import MappedImage, TensorSpec, check_specs

log = logging.getLogger(__name__)

KEPT = 8  # digests of what was installed lately: going back and forth needs no new proof


class Plans:
    """Of one model. Used by the thread that prepares, and between its runs."""

    def __init__(self) -> None:
        self._key: tuple[tuple[tuple[str, TensorSpec], ...], dict[str, tuple[int, Form]]] | None = None
        self._plan: LoadPlan | None = None
        self._why_not = ""
        self._proven_with: list[bytes] = []
        self._differing: dict[str, str] = {}
        self._tried: Path | None = None
        self.rehearsed = False
        """Whether vLLM's reload was seen to make what is installed, for this layout."""

    def split(self, model: torch.nn.Module, image: MappedImage, base: MappedImage | None, serving: bytes) -> Split:
        """Which modules are direct. `serving` is the digest of what the model holds, `base` its image."""
        plan = self.plan(model, image)
        if plan is None:
            return nothing_direct(model, None, self._why_not)
        # One that was tried with another image, and failed, may have been tried with the wrong one.
        tried_otherwise = bool(self._differing) and base is not None and base.folder != self._tried
        if serving not in self._proven_with or tried_otherwise:
            if base is None:
                return nothing_direct(model, plan, "the version that is installed is not known here")
            check_specs(base.specs, image.specs)
            self._differing, self._tried = plan.differing(model, base.tensors), base.folder
            self._proven_with = [serving]
        return split(model, plan, self._differing)

    def plan(self, model: torch.nn.Module, image: MappedImage) -> LoadPlan | None:
        """For images like this one; None when the loader could not be recorded."""
        tensors = {name: (tensor.data_ptr(), form(tensor)) for name, tensor in named_tensors(model).items()}
        key = tuple(image.specs.items()), tensors  # their order counts where one is written over another
        if self._key != key:
            self._plan, self._why_not, self._proven_with, self.rehearsed = None, "", [], False
            try:
                self._plan = record_beside(model, image.tensors)
            except NotRecorded as error:
                self._why_not = str(error)
                log.warning("no load plan: %s", error)
            self._key = key
        if isinstance(model, Together) and self._plan is not None:
            model.left_out = self._plan.left_out
        return self._plan

    def check_together(self, model: torch.nn.Module, image: MappedImage) -> None:
        """Raises NotTogether unless a draft, where there is one, can be written with its target as the image says."""
        if not isinstance(model, Together):
            return
        plan = self.plan(model, image)
        if plan is None:
            raise NotTogether(f"target and draft cannot be written together: {self._why_not}")
        if name := plan.disagreeing(image.tensors):
            raise NotTogether(
                f"the engine has one tensor for target and draft where this version has two: {name} differs from the "
                "target's; an engine started from the version has both"
            )

    def written(self, before: bytes, after: bytes) -> None:
        """An update wrote another digest by the plan: what was proven holds for that too. Empty: that is not known."""
        if after and before in self._proven_with:
            self._proven_with = [*self._proven_with, after][-KEPT:]
