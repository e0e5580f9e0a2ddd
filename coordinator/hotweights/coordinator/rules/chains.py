"""From whom a node gets an image: in chains, so that who has it sends it about once, however many nodes there are.

    seed --> first --> second --> third ...      every node passes a bucket on as soon as it is verified
    seed --> first --> ...                       a chain for each seed: for each node that had the image before

A chain of N nodes over B buckets takes (B + N - 1) / B of the time of one. A node whose source fails goes on with the
one before that, and so on to the seeds.
"""

from collections.abc import Sequence
from dataclasses import replace

from hotweights.coordinator.rules.records import UpdateRecord
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
    found = sources_of(node, chain, holders)
    return tuple(name for name in found if name not in turn.nodes or not turn.nodes[name].quarantine)


def sources_of(node: str, chain: Sequence[str], holders: Sequence[str]) -> tuple[str, ...]:
    """Where `node` is to ask, in order of preference; itself never. Empty where nobody has the image.

    `chain` are the nodes that get it, in order; `holders` have all of it by now, some of the chain among them.
    """
    if node in holders:  # whatever it has is not read for some reason
        return tuple(holder for holder in holders if holder != node)[:FALLBACKS_MAX]
    getting = set(chain)
    seeds = [holder for holder in holders if holder not in getting] or holders
    if not seeds:
        return ()
    at = chain.index(node) if node in getting else len(chain)
    before = [chain[position] for position in range(at - len(seeds), -1, -len(seeds))]
    own = at % len(seeds)
    others = [*seeds[own:], *seeds[:own]]
    found = [*before[:FALLBACKS_MAX], *others[:FALLBACKS_MAX]]
    return tuple(dict.fromkeys(found))
