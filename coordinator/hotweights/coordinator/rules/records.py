"""What is durable. Frozen, plain, and compared by the runtime, so no change can be forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Of an update; see DESIGN's diagram in update.py."""

    STAGING = "staging"
    APPLYING = "applying"
    COMMITTED = "committed"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"

    @property
    def is_open(self) -> bool:
        return self in (Phase.STAGING, Phase.APPLYING, Phase.ROLLING_BACK)


class Decision(Enum):
    """Written once for each update, durable before anyone is told."""

    NONE = "none"
    COMMIT = "commit"
    ABORT = "abort"


class Kind(Enum):
    FLEET = "fleet"
    ROLLBACK = "rollback"
    CATCH_UP = "catch_up"


class Outcome(Enum):
    """Of one replica in an update."""

    STAGING = "staging"
    PREPARED = "prepared"
    APPLYING = "applying"
    APPLIED = "applied"
    FAILED = "failed"
    RESTORING = "restoring"
    RESTORED = "restored"
    DIVERGED = "diverged"
    TORN = "torn"
    EXCLUDED = "excluded"


OUT = {Outcome.FAILED, Outcome.TORN, Outcome.EXCLUDED}
"""Members that take no part any longer."""


class Policy(Enum):
    MANUAL = "manual"
    AUTO = "auto"


class FailurePolicy(Enum):
    ROLLBACK = "rollback"
    EVICT = "evict"


class Inflight(Enum):
    RECOMPUTE = "recompute"
    DRAIN = "drain"
    ABORT = "abort"
    KEEP = "keep"


@dataclass(frozen=True)
class Options:
    """How an update goes; shares are of the roster, rounded down, at least 1."""

    failure_policy: FailurePolicy = FailurePolicy.ROLLBACK
    inflight: Inflight = Inflight.RECOMPUTE
    canary: int = 1
    max_unavailable: str = "100%"
    max_failed: str = "10%"
    staging_deadline_s: float = 1800.0
    quiesce_deadline_s: float = 30.0
    apply_deadline_s: float = 120.0
    asleep_deadline_s: float = 3600.0
    check_finite: bool = False


@dataclass(frozen=True)
class WindowTimes:
    quiesce_ms: float = 0.0
    apply_ms: float = 0.0
    resume_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """Names one order. Numbers start anew with each epoch, so both are compared."""

    epoch: int
    number: int


@dataclass(frozen=True)
class Member:
    """A replica on an update's roster."""

    replica: str
    nodes: tuple[str, ...]
    wave: int = 0
    base: str = ""
    outcome: Outcome = Outcome.STAGING
    ticket: Ticket | None = None
    reason: str = ""
    window: WindowTimes | None = None


@dataclass(frozen=True)
class UpdateRecord:
    """`target` and `base` are version names; a member's `base` is the digest it served."""

    id: str
    model: str
    kind: Kind
    target: str
    target_digest: str
    base: str
    options: Options
    members: Mapping[str, Member]
    phase: Phase = Phase.STAGING
    decision: Decision = Decision.NONE
    wave: int = 0
    reason: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True)
class ModelRecord:
    """`policy` None was never set. `history` is what was committed before, newest first."""

    name: str
    policy: Policy | None = None
    held: bool = False
    committed: str = ""
    history: tuple[str, ...] = ()
    next_sequence: int = 1
    next_update: int = 1
    tried_sequence: int = 0


@dataclass(frozen=True)
class VersionRecord:
    model: str
    name: str
    sequence: int
    digest: str
    image_bytes: int
    tensor_count: int
    bucket_count: int
    published_at: float
    available_once: bool = False
    start: bool = False
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class ReplicaRecord:
    """`desired` is a digest; empty is nothing in particular."""

    id: str
    model: str
    desired: str = ""
    excluded: bool = False
    failures: int = 0
    retry_at: float = 0.0
