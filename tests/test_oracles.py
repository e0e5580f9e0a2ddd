"""One engine for each oracle, however many tests want it."""

from pathlib import Path

import pytest
from tests.oracles import PROMPTS, Oracle, Oracles, Recipe, Shape, clear_prompts

NOTHING = Oracle({}, {}, {}, [])


def test_an_engine_is_started_once_for_a_recipe_and_a_shape(tmp_path: Path) -> None:
    started: list[tuple[str, Shape]] = []
    made: list[tuple[int, str, bool]] = []

    def ask(folder: Path, shape: Shape) -> Oracle:
        started.append((folder.name, shape))
        return NOTHING

    def make(folder: Path, seed: int, size: str, *, tied: bool) -> Path:
        made.append((seed, size, tied))
        return folder

    oracles = Oracles(tmp_path, ask, make)
    one, two = Recipe(1), Recipe(2)
    for recipe in (one, two, one):
        oracles.ask(recipe)
    oracles.ask(Recipe(1), Shape(tensor_parallel=2))
    assert started == [("tiny-1", Shape()), ("tiny-2", Shape()), ("tiny-1", Shape(tensor_parallel=2))]
    assert oracles.checkpoint(one) == oracles.checkpoint(Recipe(1))
    assert made == [(1, "tiny", False), (2, "tiny", False)]


def test_only_prompts_that_every_oracle_answers_clearly_are_held_against_an_engine() -> None:
    def oracle(**margins: float) -> Oracle:
        return Oracle({}, {}, {prompt: margins.get(prompt.split()[0], 0.0) for prompt in PROMPTS}, [])

    chosen = clear_prompts([oracle(t5=0.9, t10=0.3, t15=0.2), oracle(t5=0.1, t10=0.8, t15=0.01)], 2)
    assert [prompt.split()[0] for prompt in chosen] == ["t10", "t5"]
    with pytest.raises(AssertionError, match="only 2 of"):
        clear_prompts([oracle(t5=0.9, t10=0.3)], 3)
