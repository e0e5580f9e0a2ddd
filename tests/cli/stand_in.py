"""A replica without an engine: it takes the coordinator's orders and says what the test wants."""

import asyncio
import threading

from hotweights.v1 import fleet_pb2, update_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.wire.access import ANONYMOUS, Access
from hotweights.wire.endpoint import parse_endpoint
from hotweights.worker_client.session import Session

DEADLINE_S = 20.0
ROUTES = fleet_pb2.Routes(
    direct_modules=214,
    direct_bytes=886_000_000,
    reload_modules=2,
    reload_bytes=12_000_000,
    reasons=["model.layers.0.mlp.experts: repacked after loading"],
    sources=["cuda-ipc: 844 MiB of GPU-1 of another process"],
)


class StandIn:
    """In a thread of its own for as long as the `with` lasts.

    `breaks` makes every apply fail, undone; `misfit` every preparation. `checked` is what the last one was told.
    """

    def __init__(self, endpoint: str, model: str, digest: str, access: Access = ANONYMOUS) -> None:
        self._access = access
        self._model = model
        self._active = bytes.fromhex(digest)
        self._endpoint = parse_endpoint(endpoint)
        self._welcome = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.breaks = self.misfit = ""
        self.checked = False

    def __enter__(self) -> "StandIn":
        self._thread.start()
        assert self._welcome.wait(DEADLINE_S), "the coordinator did not welcome the replica"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(DEADLINE_S)

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._session = Session(
            self._endpoint,
            self._hello,
            self._on_order,
            on_welcome=lambda _: self._welcome.set(),
            access=self._access,
        )
        running = asyncio.ensure_future(self._session.run())
        await self._over.wait()
        await self._session.close()
        await running

    def _hello(self) -> pb.Hello:
        replica = pb.ReplicaHello(
            replica_id="stand-in", model=self._model, active_digest=self._active, engine="stand-in 1"
        )
        replica.fingerprint_kind = "stand-ins"
        replica.ranks.add(index=0, node_id="here", pid=1)
        return pb.Hello(replica=replica)

    async def _on_order(self, order: pb.Order) -> str:
        report = pb.Report(number=order.number, update_id=order.update_id, epoch=order.epoch)
        window = update_pb2.WindowTimes(quiesce_ms=1.0, apply_ms=2.0, resume_ms=3.0, total_ms=7.0)
        if order.WhichOneof("action") == "prepare" and self.misfit:
            report.prepare_failed.reason = self.misfit
        elif order.WhichOneof("action") == "prepare":
            self.checked = order.prepare.check_finite
            report.prepared.manifest_digest = order.prepare.manifest_digest
            report.prepared.base_digest = self._active
            report.prepared.routes.CopyFrom(ROUTES)
        elif order.WhichOneof("action") == "apply" and self.breaks:
            report.apply_failed.failure = pb.APPLY_FAILURE_UNDONE
            report.apply_failed.reason = self.breaks
            report.apply_failed.active_digest = self._active
            report.apply_failed.window.CopyFrom(window)
        elif order.WhichOneof("action") == "apply":
            self._active = order.apply.manifest_digest
            report.applied.active_digest = self._active
            report.applied.fingerprints.append(b"\x01\x02")
            report.applied.window.CopyFrom(window)
        else:
            return ""
        self._session.report(report)
        return ""
