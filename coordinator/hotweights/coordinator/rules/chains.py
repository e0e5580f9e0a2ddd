"""From whom a node gets an image: in chains, so that who has it sends it about once, however many nodes there are.

    seed --> first --> second --> third ...      every node passes a bucket on as soon as it is verified
    seed --> first --> ...                       a chain for each seed: for each node that had the image before

A chain of N nodes over B buckets takes (B + N - 1) / B of the time of one. A node whose source fails goes on with the
one before that, and so on to the seeds.

Where nodes say in which zone they are (a rack, a data centre), an image comes into each zone once: the first node of a
zone takes it from outside, in a chain of such first nodes, and the others of the zone from it, in a chain of their own.
Then those that a chain over all nodes would have.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hotweights.coordinator.rules.records import UpdateRecord
from hotweights.coordinator.rules.state import Node
from hotweights.coordinator.rules.turn import Turn

FALLBACKS_MAX = 4


def route(turn: Turn, update: UpdateRecord, digest: str, node: str) -> tuple[str, ...]:
    """Where a node is to get an image that the update needs: it is the last of the chain, which the effort keeps.

    So whoever stands before it was told to get the image. Nodes in quarantine are passed over.
    """
    effort = turn.efforts[update.id]
    holders = sorted(holder.id for holder in turn.holders(digest))
    chain = effort.chains.get(digest, ())
    if node not in (*chain, *holders):
        chain = (*chain, node)
    turn.efforts.put(update.id, replace(effort, chains={**effort.chains, digest: chain}))
    found = sources_of(node, chain, holders, zones_of(turn.nodes.values()))
    return tuple(name for name in found if name not in turn.nodes or not turn.nodes[name].quarantine)


def zones_of(nodes: Iterable[Node]) -> dict[str, str]:
    """Of those that say one."""
    return {node.id: node.zone for node in nodes if node.zone}


def sources_of(
    node: str, chain: Sequence[str], holders: Sequence[str], zones: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Where `node` is to ask, in order of preference; itself never. Empty where nobody has the image.

    `chain` are the nodes that get it, in order; `holders` have all of it by now, some of the chain among them. `zones`
    has those of nodes that are in one.
    """
    if node in holders:  # whatever it has is not read for some reason
        return tuple(holder for holder in holders if holder != node)[:FALLBACKS_MAX]
    getting = set(chain)
    seeds = [holder for holder in holders if holder not in getting] or holders
    if not seeds:
        return ()
    everywhere = _chained(node, chain, seeds)
    if not zones or (zone := zones.get(node)) is None:
        return everywhere
    inside = [name for name in chain if zones.get(name) == zone]
    near = [name for name in seeds if zones.get(name) == zone]
    if near:
        first = _chained(node, inside, near)
    elif node in inside[1:]:
        first = tuple(reversed(inside[: inside.index(node)]))[:FALLBACKS_MAX]
    else:
        first = _chained(node, _heads(chain, seeds, zones), seeds)
    return tuple(dict.fromkeys([*first, *everywhere]))


def _heads(chain: Sequence[str], seeds: Sequence[str], zones: Mapping[str, str]) -> list[str]:
    """The first of each zone that has no seed, and nodes in none, in the chain's order."""
    entered = {zones[name] for name in seeds if name in zones}
    heads = []
    for name in chain:
        if (zone := zones.get(name)) not in entered:
            heads.append(name)
        if zone is not None:
            entered.add(zone)
    return heads


def _chained(node: str, chain: Sequence[str], seeds: Sequence[str]) -> tuple[str, ...]:
    """Of as many chains as there are seeds, in which the nodes of `chain` stand in turn."""
    at = chain.index(node) if node in chain else len(chain)
    before = [chain[position] for position in range(at - len(seeds), -1, -len(seeds))]
    own = at % len(seeds)
    others = [*seeds[own:], *seeds[:own]]
    found = [*before[:FALLBACKS_MAX], *others[:FALLBACKS_MAX]]
    return tuple(dict.fromkeys(found))
