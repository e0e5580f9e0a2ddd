"""What is to be said, in the imperative, once the records behind it are durable."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from hotweights.coordinator.rules.records import Inflight, Ticket, WindowTimes


class Declined(Exception):
    """A move that is not allowed. `kind` becomes the gRPC status, `fields` ride along."""

    def __init__(self, kind: str, reason: str, message: str, **fields: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.message = message
        self.fields: Mapping[str, str] = fields


@dataclass(frozen=True)
class Stage:
    digest: str
    source_nodes: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True)
class Pin:
    digests: frozenset[str]


@dataclass(frozen=True)
class Prepare:
    digest: str
    deadline_s: float
    check_finite: bool = False


@dataclass(frozen=True)
class Apply:
    """GO; with `restore`, the way back."""

    digest: str
    version: str
    inflight: Inflight
    validity_s: float
    quiesce_deadline_s: float
    apply_deadline_s: float
    asleep_deadline_s: float
    restore: bool = False


@dataclass(frozen=True)
class End:
    committed: bool


Action = Stage | Pin | Prepare | Apply | End


@dataclass(frozen=True)
class Tell:
    """One order to one member, over the session it has now."""

    session: str
    member: str
    ticket: Ticket
    update: str
    action: Action


@dataclass(frozen=True)
class Drop:
    """End a session whose lease is over."""

    session: str
    reason: str


class NoteKind(Enum):
    VERSION_PUBLISHED = "version_published"
    VERSION_AVAILABLE = "version_available"
    VERSION_UNAVAILABLE = "version_unavailable"
    VERSION_DELETED = "version_deleted"
    UPDATE_STARTED = "update_started"
    UPDATE_PHASE = "update_phase"
    UPDATE_ENDED = "update_ended"
    REPLICA_ATTACHED = "replica_attached"
    REPLICA_DETACHED = "replica_detached"
    REPLICA_APPLIED = "replica_applied"
    REPLICA_DEFERRED = "replica_deferred"
    REPLICA_FAILED = "replica_failed"
    REPLICA_RESTORED = "replica_restored"
    REPLICA_EXCLUDED = "replica_excluded"
    NODE_ATTACHED = "node_attached"
    NODE_DETACHED = "node_detached"
    NODE_STAGED = "node_staged"
    SOURCE_LEFT = "source_left"
    NODE_QUARANTINED = "node_quarantined"
    MODEL_POLICY = "model_policy"
    CALL_REFUSED = "call_refused"


@dataclass(frozen=True)
class Refusal:
    """Who was refused what. `peer` is a host, or a process on the node that noted it; tokens have no place here."""

    peer: str
    name: str
    role: str
    method: str
    reason: str
    # Refusals that were not written down since the one before.
    passed_over: int = 0


@dataclass(frozen=True)
class Note:
    """An entry for the event log; the runtime gives it its revision."""

    at: float
    kind: NoteKind
    message: str
    model: str = ""
    version: str = ""
    update: str = ""
    replica: str = ""
    node: str = ""
    window: WindowTimes | None = None
    refusal: Refusal | None = None


Order = Tell | Drop | Note
