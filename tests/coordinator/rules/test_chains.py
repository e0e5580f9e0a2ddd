"""From whom each node takes an image: chains without a gap or a ring, as many as there are seeds."""

from collections import Counter

import pytest

from hotweights.coordinator.rules.chains import FALLBACKS_MAX, sources_of

CHAIN = tuple(f"n{number:02}" for number in range(20))


def test_one_seed_sends_to_one_node_and_each_node_to_one() -> None:
    assert sources_of("n00", CHAIN, ["s"]) == ("s",)
    assert sources_of("n01", CHAIN, ["s"]) == ("n00", "s")
    assert sources_of("n03", CHAIN, ["s"]) == ("n02", "n01", "n00", "s")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_every_seed_heads_a_chain_of_its_own(count: int) -> None:
    seeds = [f"s{number}" for number in range(count)]
    first = Counter(sources_of(node, CHAIN, seeds)[0] for node in CHAIN)
    assert set(first.values()) == {1}  # nobody sends to two
    assert len([source for source in first if source.startswith("s")]) == min(count, len(CHAIN))


def test_a_node_that_joins_takes_from_the_last() -> None:
    assert sources_of("late", (*CHAIN, "late"), ["s"])[0] == "n19"


def test_sources_are_as_many_as_may_fail_and_seeds_are_among_them() -> None:
    found = sources_of("n19", CHAIN, [f"s{number}" for number in range(9)])
    assert len(found) == 2 + FALLBACKS_MAX  # n10, n01, then seeds, its own first
    assert found[:3] == ("n10", "n01", "s1")
    assert len(sources_of("n19", CHAIN, ["s"])) == FALLBACKS_MAX + 1


def test_who_has_got_it_all_stays_in_its_place() -> None:
    assert sources_of("n03", CHAIN, ["n00", "n01", "s"]) == ("n02", "n01", "n00", "s")


def test_without_the_seed_those_who_have_it_all_are_asked_last() -> None:
    assert sources_of("n03", CHAIN, ["n00", "n01"]) == ("n01", "n00")


def test_who_holds_it_asks_other_holders_only() -> None:
    assert sources_of("s", CHAIN, ["s", "t"]) == ("t",)
    assert sources_of("n00", CHAIN, []) == ()
