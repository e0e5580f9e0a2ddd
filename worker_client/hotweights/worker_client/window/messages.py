"""A window in the words of the protocol: how requests in flight are paused, how it ended, and what it took."""

from hotweights.v1 import update_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.worker_client.window.engine import PauseMode
from hotweights.worker_client.window.window import Outcome, Times

FAILURES = {
    Outcome.EXPIRED: pb.APPLY_FAILURE_EXPIRED,
    Outcome.UNDONE: pb.APPLY_FAILURE_UNDONE,
    Outcome.TORN: pb.APPLY_FAILURE_TORN,
}
_MODES: dict[int, PauseMode] = {
    update_pb2.INFLIGHT_DRAIN: "drain",
    update_pb2.INFLIGHT_ABORT: "abort",
    update_pb2.INFLIGHT_KEEP: "keep",
}


def mode_of(order: pb.ApplyImage, *, clears_caches: bool) -> PauseMode:
    """As ordered; but where the KV cache is cleared, nothing in flight can go on with what it computed."""
    mode = _MODES.get(order.inflight, "recompute")
    return "recompute" if mode == "keep" and clears_caches else mode


def times_message(times: Times, total_s: float) -> update_pb2.WindowTimes:
    """With what it took from the order's arrival on."""
    return update_pb2.WindowTimes(
        quiesce_ms=times.quiesce_ms,
        apply_ms=times.apply_ms,
        resume_ms=times.resume_ms,
        total_ms=total_s * 1000.0,
    )


def paused_ms(window: update_pb2.WindowTimes) -> float:
    """All of the pause."""
    return window.quiesce_ms + window.apply_ms + window.resume_ms
