"""The coordinator's orders to an agent, and what is reported of them."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.wire import failpoints
from hotweights.worker_client.agent.edge import EXPECTED, as_refusal
from hotweights.worker_client.agent.images import Images, Staging

log = logging.getLogger(__name__)

UNDER_WAY_MAX = 64
STAGING_DEADLINE_S = 3600.0  # for an order that gives none


class Orders:
    """Takes orders at once and does them in tasks."""

    def __init__(self, images: Images, report: Callable[[pb.Report], None]) -> None:
        self._images = images
        self._report = report
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, order: pb.Order) -> str:
        """ "" takes the order; else why not."""
        match order.WhichOneof("action"):
            case "stage":
                if len(self._tasks) >= UNDER_WAY_MAX:
                    return f"{UNDER_WAY_MAX} images are being staged already"
                self._begin(order)
                return ""
            case "unpin":
                await asyncio.to_thread(self._images.stage.set_pinned, list(order.unpin.pinned_digests))
                return ""
            case other:
                return f"an agent does not know the order {other!r}"

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, order: pb.Order) -> None:
        task = asyncio.ensure_future(self._stage(order))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, order))

    def _ended(self, task: "asyncio.Task[None]", order: pb.Order) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("order %d ended in a way nobody foresaw", order.number, exc_info=bug)
            failed = pb.StageFailed(manifest_digest=order.stage.manifest_digest, reason=f"the agent failed: {bug!r}")
            self._report(
                pb.Report(number=order.number, update_id=order.update_id, epoch=order.epoch, stage_failed=failed)
            )

    async def _stage(self, order: pb.Order) -> None:
        digest = order.stage.manifest_digest
        report = pb.Report(number=order.number, update_id=order.update_id, epoch=order.epoch)
        told = 0
        work = self._images.begin(digest, list(order.stage.sources))
        try:
            async for _ in work.follow(order.stage.deadline_s or STAGING_DEADLINE_S):
                self._tell_progress(report, digest, work)
                told = self._tell_left(report, digest, work.tally.left, told)
            work.task.result()
            self._tell_progress(report, digest, work)  # once more: what came since it was last told, and all of it
        except EXPECTED as error:
            reason = as_refusal(error).message
            log.warning("image %s is not staged: %s", digest.hex()[:16], reason)
            report.stage_failed.CopyFrom(pb.StageFailed(manifest_digest=digest, reason=reason))
        else:
            failpoints.hit("stage.report")
            report.staged.CopyFrom(pb.Staged(manifest_digest=digest))
        self._tell_left(report, digest, work.tally.left, told)
        self._report(report)

    def _tell_progress(self, report: pb.Report, digest: bytes, work: Staging) -> None:
        bytes_done, bytes_total = work.figures.read()
        more, tally = _copied(report), work.tally
        progress = pb.StageProgress(manifest_digest=digest, bytes_done=bytes_done, bytes_total=bytes_total)
        progress.source_node_id, progress.bytes_per_s = tally.source, tally.bytes_per_s
        progress.wire_bytes, progress.transport = tally.wire_bytes, tally.way
        more.stage_progress.CopyFrom(progress)
        self._report(more)

    def _tell_left(self, report: pb.Report, digest: bytes, left: Sequence[pb.SourceLeft], told: int) -> int:
        """Reports the sources that were left since `told` of them were."""
        for source in left[told:]:
            more = _copied(report)
            more.source_left.CopyFrom(source)
            more.source_left.manifest_digest = digest
            self._report(more)
        return len(left)


def _copied(report: pb.Report) -> pb.Report:
    copy = pb.Report()
    copy.CopyFrom(report)
    return copy
