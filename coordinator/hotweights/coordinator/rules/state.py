"""All there is: the records, and what members said of themselves since this leader began."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hotweights.coordinator.rules.records import (
    Member,
    ModelRecord,
    Outcome,
    ReplicaRecord,
    Ticket,
    UpdateRecord,
    VersionRecord,
    WindowTimes,
)

ACCUSERS_MIN = 2


@dataclass(frozen=True)
class Limits:
    """Settings the rules need; seconds unless named otherwise."""

    lease_s: float = 15.0
    go_validity_s: float = 10.0
    report_margin_s: float = 5.0
    roll_back_deadline_s: float = 300.0
    catch_up_backoff_s: float = 5.0
    catch_up_failures_max: int = 3
    forget_s: float = 600.0
    keep_versions: int = 0
    history_max: int = 16


@dataclass(frozen=True)
class Routes:
    """How an image is written into a replica, summed over its ranks.

    `reasons` are why modules are not written directly, `sources` from whose GPU memory values come.
    """

    direct_modules: int = 0
    direct_bytes: int = 0
    assembled_modules: int = 0
    assembled_bytes: int = 0
    reload_modules: int = 0
    reload_bytes: int = 0
    reasons: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seat:
    """A replica's presence. `heard` is the newest order that a window was reported for.

    `fingerprints` are of what is `active`; replicas of another `fingerprint_kind` have others for the same.
    """

    id: str
    model: str
    session: str
    incarnation: str
    nodes: tuple[str, ...]
    ranks: tuple[tuple[int, str, int], ...]
    active: str
    identifying: bool
    open_window: str
    engine: str
    lease_until: float
    connected: bool = True
    fingerprints: tuple[str, ...] = ()
    fingerprint_kind: str = ""
    routes: Routes | None = None
    window: WindowTimes | None = None
    note: str = ""
    heard: Ticket | None = None

    def serving(self, active: str, fingerprints: tuple[str, ...] = ()) -> "Seat":
        """It said so; fingerprints that were not said again are kept only for the same digest."""
        kept = self.fingerprints if active == self.active else ()
        return replace(self, active=active, fingerprints=fingerprints or kept)


@dataclass(frozen=True)
class Node:
    """An agent's presence. `token_key` checks transfer tokens and is never shown."""

    id: str
    session: str
    incarnation: str
    endpoint: str
    held: frozenset[str]
    lease_until: float
    token_key: bytes = field(default=b"", repr=False)
    bytes_used: int = 0
    bytes_free: int = 0
    connected: bool = True
    pins_told: frozenset[str] | None = None
    zone: str = ""
    accusers: frozenset[str] = frozenset()
    """Nodes to which it sent wrong bytes. One of them may be broken itself: it takes ACCUSERS_MIN."""

    @property
    def quarantine(self) -> str:
        """Why nobody is to fetch from it; empty where it is as good as any."""
        if len(self.accusers) < ACCUSERS_MIN:
            return ""
        return f"sent wrong bytes to nodes {', '.join(sorted(self.accusers))}"


@dataclass(frozen=True)
class Progress:
    """Of a node that gets an image: from whom last, and how fast."""

    bytes_done: int
    bytes_total: int
    source: str = ""
    bytes_per_s: float = 0.0
    wire_bytes: int = 0
    transport: str = ""


@dataclass(frozen=True)
class Effort:
    """What this leader has done so far for an open update."""

    deadline_at: float
    asked: frozenset[tuple[str, str]] = frozenset()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By digest, the nodes that get it, in the order in which they pass it on."""
    staged: frozenset[tuple[str, str]] = frozenset()
    progress: Mapping[str, Progress] = field(default_factory=dict)
    left: frozenset[tuple[str, str, str]] = frozenset()
    """Which node left which source for what reason: told once."""
    preparing: Mapping[str, Ticket] = field(default_factory=dict)
    due: Mapping[str, float] = field(default_factory=dict)
    deferred: frozenset[str] = frozenset()


@dataclass(frozen=True)
class State:
    """Records first; then what is volatile."""

    epoch: int
    led_at: float
    limits: Limits = field(default_factory=Limits)
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    versions: Mapping[tuple[str, str], VersionRecord] = field(default_factory=dict)
    updates: Mapping[str, UpdateRecord] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaRecord] = field(default_factory=dict)
    seats: Mapping[str, Seat] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    efforts: Mapping[str, Effort] = field(default_factory=dict)
    next_number: int = 1


def recovered(state: State) -> State:
    """Records as a new leader takes them over.

    What was prepared is asked for again: whether it still holds is the replica's to say.
    """
    updates = dict(state.updates)
    for update in state.updates.values():
        if not update.phase.is_open:
            continue
        members = {name: _unprepared(member) for name, member in update.members.items()}
        updates[update.id] = replace(update, members=members)
    return replace(state, updates=updates)


def _unprepared(member: Member) -> Member:
    if member.outcome is Outcome.PREPARED:
        return replace(member, outcome=Outcome.STAGING)
    return member
