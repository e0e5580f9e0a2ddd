"""Sessions that are open, and what waits to be said to each. Every queue has a bound."""

import asyncio
import time
from collections.abc import Callable

from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import Inflight
from hotweights.coordinator.rules.state import State
from hotweights.v1 import update_pb2, worker_service_pb2
from hotweights.wire.tokens import make_token

ORDERS_MAX = 256
INFLIGHT = {
    Inflight.RECOMPUTE: update_pb2.INFLIGHT_RECOMPUTE,
    Inflight.DRAIN: update_pb2.INFLIGHT_DRAIN,
    Inflight.ABORT: update_pb2.INFLIGHT_ABORT,
    Inflight.KEEP: update_pb2.INFLIGHT_KEEP,
}


class Outlet:
    """What is to be said on one stream. Full or ended, it says so by `ended`."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[worker_service_pb2.Order] = asyncio.Queue(ORDERS_MAX)
        self.ended = asyncio.Event()
        self.reason = ""

    def offer(self, order: worker_service_pb2.Order) -> None:
        try:
            self.queue.put_nowait(order)
        except asyncio.QueueFull:
            self.end("too slow to read its orders; reconnect and say Hello again")

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.ended.set()


class Hub:
    """Outlets by session. Speaks for the runtime; never waits."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._outlets: dict[str, Outlet] = {}
        self._wall_clock = wall_clock

    def open(self, session: str) -> Outlet:
        outlet = self._outlets[session] = Outlet()
        return outlet

    def close(self, session: str) -> None:
        self._outlets.pop(session, None)

    def end_all(self, reason: str) -> None:
        for outlet in self._outlets.values():
            outlet.end(reason)

    def drop(self, drop: o.Drop) -> None:
        outlet = self._outlets.get(drop.session)
        if outlet is not None:
            outlet.end(drop.reason)

    def tell(self, tell: o.Tell, state: State, revision: int) -> None:
        """Queues an order. A session that is gone hears nothing: its next Hello is compared."""
        outlet = self._outlets.get(tell.session)
        if outlet is not None:
            outlet.offer(self._order(tell, state, revision))

    def _order(self, tell: o.Tell, state: State, revision: int) -> worker_service_pb2.Order:
        order = worker_service_pb2.Order(
            number=tell.ticket.number,
            nonce=tell.ticket.number,
            epoch=tell.ticket.epoch,
            revision=revision,
            update_id=tell.update,
        )
        match tell.action:
            case o.Stage() as stage:
                order.stage.CopyFrom(self._stage(stage, tell.member, state))
            case o.Pin(digests):
                order.unpin.pinned_digests.extend(bytes.fromhex(d) for d in sorted(digests))
            case o.Prepare(digest, deadline_s, check_finite):
                order.prepare.manifest_digest = bytes.fromhex(digest)
                order.prepare.deadline_s = deadline_s
                order.prepare.check_finite = check_finite
            case o.Apply() as go:
                order.apply.CopyFrom(_apply(go))
            case o.End(committed):
                order.end.committed = committed
                order.end.SetInParent()
        return order

    def _stage(self, stage: o.Stage, reader: str, state: State) -> worker_service_pb2.StageImage:
        digest = bytes.fromhex(stage.digest)
        message = worker_service_pb2.StageImage(manifest_digest=digest, deadline_s=stage.deadline_s)
        expires_at = self._wall_clock() + stage.deadline_s
        for name in stage.source_nodes:
            node = state.nodes.get(name)
            if node is not None and node.endpoint and node.token_key:
                token = make_token(node.token_key, digest, reader, name, int(expires_at))
                staging = stage.digest not in node.held
                message.sources.add(node_id=name, data_endpoint=node.endpoint, token=token, staging=staging)
        return message


def _apply(go: o.Apply) -> worker_service_pb2.ApplyImage:
    return worker_service_pb2.ApplyImage(
        manifest_digest=bytes.fromhex(go.digest),
        version=go.version,
        inflight=INFLIGHT[go.inflight],
        validity_s=go.validity_s,
        quiesce_deadline_s=go.quiesce_deadline_s,
        apply_deadline_s=go.apply_deadline_s,
        asleep_deadline_s=go.asleep_deadline_s,
        restore=go.restore,
    )
