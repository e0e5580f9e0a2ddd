"""The models of an engine that one version is for: the target, and the draft model that speculates for it.

    checkpoint/            the target's                        engine started with --model checkpoint and
    checkpoint/draft/      the draft's, a component of its own   {"model": "checkpoint/draft", ...}
    checkpoint/            both, where the target has the        {"method": "mtp", ...}: vLLM loads the draft
                           layers of its draft in itself         from the checkpoint of the target

Both are planned, written, proven and taken back as one module. A draft that the engine loaded from anywhere else is not
of the version: it is left alone.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import chain
from typing import Any

import torch

from hotweights.adapters.checkpoint import checkpoint_folder

DRAFT = "draft"
DRAFT_PREFIX = f"{DRAFT}/"
"""Before the names of a draft's tensors: those of checkpoints have no slash."""

Weights = Iterable[tuple[str, torch.Tensor]]
_KEPT = "_hotweights_together"


class NotTogether(Exception):
    """A version that cannot be written to target and draft at once; the text says why."""


class Source(Enum):
    """Where an engine's draft model comes from."""

    NONE = "there is none, or it has no weights"
    OWN = "the folder `draft` of the checkpoint"
    TARGET = "the checkpoint of the target itself"
    ELSEWHERE = "another place"


class Together(torch.nn.Module):
    """Target and draft as one module, which may share some of their own.

    `left_out` names what the draft is not given: it would go into what the target fills.
    """

    def __init__(self, target: torch.nn.Module, draft: torch.nn.Module, source: Source) -> None:
        super().__init__()
        self.target, self.draft, self.source = target, draft, source
        self.left_out: frozenset[str] = frozenset()

    def of_draft(self, name: str) -> bool:
        """Whether this tensor is for the draft's loader. The target's is given those without the prefix."""
        return self.source is Source.TARGET or name.startswith(DRAFT_PREFIX)

    def load_target(self, weights: Weights) -> set[str]:
        """Gives the parameters it loaded, by their names here."""
        return {f"target.{name}" for name in self.target.load_weights(weights) or ()}  # type: ignore[operator]

    def load_draft(self, weights: Weights) -> set[str]:
        """Likewise."""
        named = ((name.removeprefix(DRAFT_PREFIX), tensor) for name, tensor in weights)
        return {f"draft.{name}" for name in self.draft.load_weights(named) or ()}  # type: ignore[operator]

    def load_weights(self, weights: Weights) -> set[str]:
        """The target's tensors come first. Raises NotTogether when its loader stops before their end."""
        items, held, seen = iter(weights), [], []

        def of_target() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in items:
                if name.startswith(DRAFT_PREFIX):
                    held.append((name, tensor))
                    return
                if self.source is Source.TARGET:
                    seen.append((name, tensor))
                yield name, tensor

        def of_draft() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in chain(seen, held, items):
                if not self.of_draft(name):
                    raise NotTogether(f"the target's loader stopped before {name}")
                if name not in self.left_out:
                    yield name, tensor

        return self.load_target(of_target()) | self.load_draft(of_draft())


def source(worker: Any) -> Source:
    """Where the draft model of a worker comes from."""
    draft = _draft(worker)
    if draft is None:
        return Source.NONE
    own = checkpoint_folder(worker.model_config)
    drafts = checkpoint_folder(worker.vllm_config.speculative_config.draft_model_config)
    if own is None or drafts is None:
        return Source.ELSEWHERE
    if drafts == own:
        return Source.TARGET
    return Source.OWN if drafts == own / DRAFT else Source.ELSEWHERE


def model_of(worker: Any) -> torch.nn.Module:
    """What versions are written to: the worker's model, with its draft where that belongs to the version."""
    target: torch.nn.Module = worker.model_runner.get_model()
    draft = _draft(worker)
    if draft is None:
        return target
    kept: Together | None = worker.__dict__.get(_KEPT)
    if kept is not None and kept.target is target and kept.draft is draft:
        return kept
    if (found := source(worker)) not in (Source.OWN, Source.TARGET):
        return target
    worker.__dict__[_KEPT] = together = Together(target, draft, found)
    return together


def _draft(worker: Any) -> torch.nn.Module | None:
    """The model that speculates, out of what graphs wrap it in; None for methods without one."""
    runner = worker.model_runner
    proposer = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)  # of vLLM's newer runner
    model: Any = getattr(proposer, "model", None)
    if hasattr(model, "unwrap"):
        model = model.unwrap()
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "load_weights"):
        return None
    return model if any(True for _ in model.parameters()) else None
