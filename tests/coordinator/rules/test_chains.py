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


# Zones.

ZONES = {node: f"rack{at % 4}" for at, node in enumerate(CHAIN)}


def zone_of(name: str, zones: dict[str, str]) -> str:
    return zones.get(name, "")


@pytest.mark.parametrize(
    "seeds", [{"s": "rack0"}, {"s": ""}, {"s": "rack0", "t": "rack2"}, {"s": "rack9", "t": "rack9"}]
)
def test_an_image_comes_into_each_zone_once(seeds: dict[str, str]) -> None:
    zones = ZONES | {name: zone for name, zone in seeds.items() if zone}
    first = {node: sources_of(node, CHAIN, sorted(seeds), zones)[0] for node in CHAIN}
    entries = Counter(zones[node] for node, source in first.items() if zone_of(source, zones) != zones[node])
    assert entries == Counter({f"rack{number}" for number in range(4)} - set(seeds.values()))
    # Nobody sends to more than one in his zone and one beyond it; whoever is asked has it, or stands before.
    inside = Counter(source for node, source in first.items() if zone_of(source, zones) == zones[node])
    assert max(inside.values()) == 1
    beyond = Counter(source for node, source in first.items() if zone_of(source, zones) != zones[node])
    assert not beyond or max(beyond.values()) == 1
    assert all(source in seeds or CHAIN.index(source) < CHAIN.index(node) for node, source in first.items())


def test_nodes_in_no_zone_stand_in_the_chain_that_goes_from_zone_to_zone() -> None:
    chain = ("a1", "x", "a2", "b1", "y", "b2")
    zones = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
    first = {node: sources_of(node, chain, ["s"], zones)[0] for node in chain}
    assert first["a1"] == "s"
    assert first["a2"] == "a1"
    assert first["b2"] == "b1"
    assert first["b1"] == "x"


def test_whoever_fails_in_a_zone_is_followed_by_those_before_it_and_then_by_others() -> None:
    found = sources_of("n08", CHAIN, ["s"], ZONES)
    assert found[:2] == ("n04", "n00")
    assert found[-1] == "s"
    assert len(found) == len(set(found))
    assert "n08" not in found


def test_zones_of_other_nodes_change_nothing_for_one_that_has_none() -> None:
    assert sources_of("n03", CHAIN, ["s"], {"n00": "a", "n01": "b"}) == sources_of("n03", CHAIN, ["s"])
