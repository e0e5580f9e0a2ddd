"""What engines freshly started on a checkpoint answer: each asked once a session, whoever needs it.

    Recipe --random_llama--> folder --oracle.py, a process of its own--> Oracle

An engine takes a minute to start. Tests in any folder that take their checkpoints and oracles from here share both, as
long as the checkpoint's recipe and the engine's shape are the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import warm
from tests.models import make_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINE_DEADLINE_S = 280.0
# All that any test asks: enough of them that some decide clearly (see examples/oracle.py).
PROMPTS = tuple(f"t{n} t{n + 9} t{2 * n}" for n in range(5, 245, 5))
MARGIN_MIN = 0.05


@dataclass(frozen=True)
class Recipe:
    """A checkpoint of examples/random_llama.py."""

    seed: int
    size: str = "tiny"
    tied: bool = False


@dataclass(frozen=True)
class Shape:
    """What of an engine decides its answers. `tensor_parallel` ranks give as many fingerprints."""

    dtype: str = "bfloat16"
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Oracle:
    """By prompt: greedy output, its tokens, and how clear its closest decision was. One fingerprint a rank, in hex."""

    outputs: dict[str, str]
    tokens: dict[str, list[int]]
    margins: dict[str, float]
    fingerprints: list[str]


def ask_fresh_engine(folder: Path, shape: Shape) -> Oracle:
    """Of an engine that is started for this and ended."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    engine = ["--dtype", shape.dtype, "--tensor-parallel-size", str(shape.tensor_parallel)]
    done = warm.run(EXAMPLES / "oracle.py", str(folder), *engine, *prompts, deadline_s=ENGINE_DEADLINE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: Any = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    outputs, tokens, margins = (
        dict(zip(PROMPTS, answer[name], strict=True)) for name in ("outputs", "tokens", "margins")
    )
    return Oracle(outputs, tokens, margins, answer["fingerprints"])


class Oracles:
    """Checkpoints and oracles of one test session, in `root`."""

    def __init__(
        self,
        root: Path,
        ask: Callable[[Path, Shape], Oracle] = ask_fresh_engine,
        make: Callable[..., Path] = make_checkpoint,
    ) -> None:
        self._root = root
        self._ask, self._make = ask, make
        self._folders: dict[Recipe, Path] = {}
        self._answers: dict[tuple[Recipe, Shape], Oracle] = {}

    def checkpoint(self, recipe: Recipe) -> Path:
        """Its folder, not to be written to: others read it too."""
        if recipe not in self._folders:
            folder = self._root / f"{recipe.size}-{recipe.seed}{'-tied' * recipe.tied}"
            self._folders[recipe] = self._make(folder, recipe.seed, recipe.size, tied=recipe.tied)
        return self._folders[recipe]

    def ask(self, recipe: Recipe, shape: Shape | None = None) -> Oracle:
        """The oracle of the checkpoint; an engine is started only for what nobody has asked yet."""
        key = (recipe, shape or Shape())
        if key not in self._answers:
            self._answers[key] = self._ask(self.checkpoint(recipe), key[1])
        return self._answers[key]


def clear_prompts(oracles: Sequence[Oracle], wanted: int) -> list[str]:
    """Prompts on which every oracle decides clearly, the clearest first: those hold for a busy engine too."""
    margins = {prompt: min(oracle.margins[prompt] for oracle in oracles) for prompt in PROMPTS}
    clear = [prompt for prompt in sorted(PROMPTS, key=lambda prompt: -margins[prompt]) if margins[prompt] >= MARGIN_MIN]
    assert len(clear) >= wanted, f"only {len(clear)} of {len(PROMPTS)} prompts have clear outputs"
    return clear[:wanted]
