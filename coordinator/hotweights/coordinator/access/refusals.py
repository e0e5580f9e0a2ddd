"""Refused calls in the event log, with who and what, and never so many that they push the rest out.

A burst of 20 is written, 5 of one peer, then one a minute: some 1,500 a day at most, where the log
keeps 100,000 entries. The rest is counted, and the count stands in the next entry.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import unquote

from hotweights.coordinator.access.tokens import Caller
from hotweights.coordinator.rules.events import CallRefused, Event
from hotweights.coordinator.rules.orders import Refusal
from hotweights.v1 import fleet_pb2
from hotweights.wire.allowance import Allowance, Rate

log = logging.getLogger(__name__)

TEXT_LENGTH_MAX = 200
COUNT_MAX = 1 << 32
OF_ONE_PEER = Rate(burst=5, every_s=300.0)
OF_ALL_PEERS = Rate(burst=20, every_s=60.0)


class Refusals:
    """Writes what was refused, as far as the allowance goes."""

    def __init__(self, offer: Callable[[Event], bool], now: Callable[[], float]) -> None:
        """`offer` hands an event in without waiting, False when there is no room."""
        self._offer = offer
        self._now = now
        self._allowance = Allowance(OF_ONE_PEER, OF_ALL_PEERS)

    def note(self, peer: str, caller: Caller | None, method: str, reason: str) -> None:
        """`peer` as gRPC has it; `caller` where a token said who it is."""
        name, role = (caller.name, caller.role.value) if caller is not None else ("", "")
        host = host_of(peer)
        self._write(host, Refusal(host, name, role, method, reason))

    def note_at(self, node: str, reported: fleet_pb2.Refusal) -> None:
        """What a node's agent reports that its socket refused."""
        refusal = Refusal(
            reported.peer[:TEXT_LENGTH_MAX],
            reported.name[:TEXT_LENGTH_MAX],
            reported.role[:TEXT_LENGTH_MAX],
            reported.method[:TEXT_LENGTH_MAX],
            reported.reason[:TEXT_LENGTH_MAX],
            reported.passed_over,
        )
        self._write(f"node {node}", refusal, node)

    def _write(self, source: str, refusal: Refusal, node: str = "") -> None:
        passed_over = self._allowance.take(source)
        if passed_over is None:
            log.debug("refused %s to %s: %s", refusal.method, source, refusal.reason)
            return
        counted = min(refusal.passed_over + passed_over, COUNT_MAX)
        if not self._offer(CallRefused(self._now(), replace(refusal, passed_over=counted), node)):
            self._allowance.give_back(passed_over)


def host_of(peer: str) -> str:
    """The host of gRPC's "ipv4:10.0.0.7:40112": ports change with every connection."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") or rest if kind in ("ipv4", "ipv6") else kind
