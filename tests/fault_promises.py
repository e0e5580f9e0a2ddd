"""What is promised for every fault, written before any was injected; docs/RELIABILITY.md shows it beside the outcome.

A promise is changed only in a commit of its own that says why, never to fit what a run gave.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    key: str
    fault: str
    promise: str


# For every fault: outputs are the old oracle's or the new one's, never a third's. Asserted everywhere, not repeated.
FAULTS = (
    Fault(
        "rank-fails-at-tensor",
        "one rank of two fails after the k-th tensor, every k",
        "both ranks undo, the old version serves on; the next update works",
    ),
    Fault(
        "rank-killed-in-pause",
        "a rank killed in the pause",
        "torn: the engine is ended, its server ends and says why; the update is ROLLED_BACK with the replica named; "
        "restarted, it serves the committed version",
    ),
    Fault(
        "engine-killed-staging",
        "engine core killed while an update stages",
        "the server ends; the update is ABORTED with the replica named; restarted, it serves the committed version",
    ),
    Fault(
        "engine-killed-applying",
        "engine core killed while it applies",
        "the server ends; the update is ROLLED_BACK with the replica named; restarted, it serves the committed version",
    ),
    Fault(
        "controller-killed-staging",
        "front end with the controller killed while an update stages",
        "the engine core ends with it; the update is ABORTED with the replica named; restarted, it serves the "
        "committed version",
    ),
    Fault(
        "controller-killed-applying",
        "front end with the controller killed in the pause",
        "the engine core ends with it; the update is ROLLED_BACK with the replica named; restarted, it serves the "
        "committed version",
    ),
    Fault(
        "controller-fails-in-pause",
        "the controller ends by a bug in the pause",
        "no engine stays paused for good: torn, its server ends; the update is ROLLED_BACK; restarted, it serves the "
        "committed version",
    ),
    Fault(
        "agent-killed-publishing",
        "agent killed while it publishes a folder",
        "nothing is half-published; the publisher waits for the agent and publishes, or says so and can be run again",
    ),
    Fault(
        "agent-killed-staging",
        "agent killed at a bucket, before and after the rename, before its report",
        "no request fails; the agent that comes back goes on with what is verified and the update commits",
    ),
    Fault(
        "agent-killed-applying",
        "agent killed after it staged, while the engine applies",
        "the update commits without it, no request fails",
    ),
    Fault(
        "coordinator-killed-at-write",
        "coordinator killed before and after each durable write of an update",
        "started again it ends the update: COMMITTED or ROLLED_BACK or ABORTED, and what is served is what is "
        "desired; no request fails",
    ),
    Fault(
        "coordinator-stopped",
        "coordinator stopped (SIGSTOP) for longer than every lease",
        "nobody is taken for lost: the update goes on when it does; no request fails",
    ),
    Fault(
        "agent-stopped",
        "agent stopped for longer than its lease while it stages",
        "the update is ABORTED with the node named, the old version serves on; no request fails; continued, it stages "
        "again",
    ),
    Fault(
        "controller-stopped",
        "front end stopped in the pause for longer than the apply's deadline",
        "the update is ROLLED_BACK with the replica named; continued, it comes to the committed version by itself or "
        "is torn and says so",
    ),
    Fault(
        "engine-stopped",
        "engine core stopped in the pause for longer than the apply's deadline",
        "torn: the core is ended though it is stopped, the server ends and says why; the update is ROLLED_BACK; "
        "restarted, it serves the committed version",
    ),
    Fault(
        "stage-full",
        "no room left in the stage",
        "the update is ABORTED with figures before anything is written; with room again the same update works; no "
        "request fails",
    ),
    Fault(
        "store-full",
        "disk full under the coordinator's store, before and during an update",
        "commands are refused with the reason, reports wait; with room again the update ends; no request fails",
    ),
    Fault(
        "image-altered",
        "a staged image altered on disk after it was verified",
        "never installed: refused by name, the update is ABORTED, or ROLLED_BACK where GO was out; the next one "
        "fetches the bytes anew and works",
    ),
    Fault(
        "folder-rewritten-publishing",
        "a folder rewritten while it is published",
        "refused by name, nothing is published",
    ),
    Fault(
        "folder-rewritten-staging",
        "a published folder rewritten while it is staged from",
        "refused by name, the update is ABORTED, the folder is no longer offered",
    ),
    Fault(
        "version-does-not-fit",
        "a version with a tensor missing, one too many, another shape, another dtype",
        "refused by the tensor's name before the pause; the update is ABORTED",
    ),
    Fault(
        "not-finite",
        "a version with values that are not finite, `--check-finite`",
        "refused by the tensor's name before the pause; the update is ABORTED",
    ),
    Fault(
        "nan-in-cache",
        "NaN in the KV cache after a bad version",
        "gone after the rollback: outputs are the old oracle's",
    ),
    Fault(
        "many-swaps",
        "200 swaps in a row under traffic",
        "no request fails; resident memory, file descriptors, threads, /dev/shm and the store stay within bounds",
    ),
)
BY_KEY = {fault.key: fault for fault in FAULTS}
