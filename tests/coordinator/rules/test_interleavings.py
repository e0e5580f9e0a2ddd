"""Seeded interleavings of a small fleet: every invariant of simulation.py, at every write and at rest."""

import pytest
from tests.coordinator.rules.simulation import World

SEEDS = 500
TURNS = 120
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_invariants_hold_under_every_seed(first: int) -> None:
    for seed in range(first, first + CHUNK):
        try:
            World(seed).run(TURNS)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_seeds_reach_what_they_are_for() -> None:
    """A simulation in which nothing ever commits, rolls back or changes leaders would prove nothing."""
    worlds = [World(seed) for seed in range(60)]
    for world in worlds:
        world.run(TURNS)
    assert sum(world.commits > 0 for world in worlds) > 15
    assert sum(world.rollbacks > 0 for world in worlds) > 8
    assert sum(world.differed > 0 for world in worlds) > 0
    assert sum(world.epoch > 1 for world in worlds) > 30
