"""What happened, in the past tense. Every event carries `now`, in seconds of the leader's clock."""

from dataclasses import dataclass, field

from hotweights.coordinator.rules.orders import Refusal
from hotweights.coordinator.rules.records import Kind, Options, Policy, Ticket, WindowTimes
from hotweights.coordinator.rules.state import Routes


@dataclass(frozen=True)
class Event:
    now: float


# Members come, go and are heard from.


@dataclass(frozen=True)
class AgentAttached(Event):
    node: str
    session: str
    incarnation: str
    endpoint: str
    held: frozenset[str]
    token_key: bytes = field(default=b"", repr=False)
    bytes_used: int = 0
    bytes_free: int = 0
    zone: str = ""


@dataclass(frozen=True)
class ReplicaAttached(Event):
    replica: str
    session: str
    incarnation: str
    model: str
    policy: Policy | None
    ranks: tuple[tuple[int, str, int], ...]
    active: str
    identifying: bool = False
    open_window: str = ""
    engine: str = ""
    fingerprints: tuple[str, ...] = ()
    fingerprint_kind: str = ""


@dataclass(frozen=True)
class FromMember(Event):
    """`member` is a node's or a replica's id; a session that was replaced is not listened to."""

    member: str
    session: str


@dataclass(frozen=True)
class Left(FromMember):
    pass


@dataclass(frozen=True)
class Beat(FromMember):
    pass


@dataclass(frozen=True)
class StageProgressed(FromMember):
    update: str
    digest: str
    bytes_done: int
    bytes_total: int
    source: str = ""
    bytes_per_s: float = 0.0
    wire_bytes: int = 0
    transport: str = ""


@dataclass(frozen=True)
class SourceLeft(FromMember):
    """`lied`: it sent wrong bytes more than once."""

    update: str
    digest: str
    source: str
    reason: str
    lied: bool


@dataclass(frozen=True)
class Staged(FromMember):
    update: str
    digest: str


@dataclass(frozen=True)
class StageFailed(FromMember):
    update: str
    digest: str
    reason: str


@dataclass(frozen=True)
class HeldChanged(FromMember):
    held: frozenset[str]
    bytes_used: int
    bytes_free: int


@dataclass(frozen=True)
class Prepared(FromMember):
    update: str
    ticket: Ticket
    base: str
    routes: Routes | None = None


@dataclass(frozen=True)
class PrepareFailed(FromMember):
    update: str
    ticket: Ticket
    reason: str


@dataclass(frozen=True)
class Applied(FromMember):
    update: str
    ticket: Ticket
    active: str
    window: WindowTimes
    fingerprints: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class ApplyFailed(FromMember):
    """`torn`: a rank did not answer and the engine was ended; else the old version serves."""

    update: str
    ticket: Ticket
    reason: str
    active: str
    torn: bool = False
    window: WindowTimes | None = None


@dataclass(frozen=True)
class Deferred(FromMember):
    """GO was taken by an engine that is asleep: its window opens when its owner wakes it."""

    update: str
    ticket: Ticket
    reason: str


@dataclass(frozen=True)
class ActiveChanged(FromMember):
    active: str
    fingerprints: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class OrderRefused(FromMember):
    """The member answered an order with NACK."""

    update: str
    ticket: Ticket
    reason: str


# People and publishers ask.


@dataclass(frozen=True)
class VersionPublished(Event):
    model: str
    name: str
    digest: str
    image_bytes: int
    tensor_count: int
    bucket_count: int
    start: bool = False
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class VersionDeleted(Event):
    model: str
    name: str


@dataclass(frozen=True)
class UpdateAsked(Event):
    """`version` empty is the newest; for a rollback, the one committed before."""

    model: str
    version: str
    options: Options
    kind: Kind = Kind.FLEET


@dataclass(frozen=True)
class CancelAsked(Event):
    update: str


@dataclass(frozen=True)
class PolicySet(Event):
    model: str
    policy: Policy


@dataclass(frozen=True)
class ModelResumed(Event):
    model: str


@dataclass(frozen=True)
class ReplicaUndrained(Event):
    replica: str


@dataclass(frozen=True)
class CallRefused(Event):
    """Somebody was turned away, here or at a node's agent: nothing but an entry of the log follows."""

    refusal: Refusal
    node: str = ""


@dataclass(frozen=True)
class Ticked(Event):
    """Time passed; for `overslept_s` of it the leader itself did not run, which is held against nobody."""

    overslept_s: float = 0.0
