from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdatePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_PHASE_UNSPECIFIED: _ClassVar[UpdatePhase]
    UPDATE_PHASE_STAGING: _ClassVar[UpdatePhase]
    UPDATE_PHASE_APPLYING: _ClassVar[UpdatePhase]
    UPDATE_PHASE_COMMITTED: _ClassVar[UpdatePhase]
    UPDATE_PHASE_ROLLING_BACK: _ClassVar[UpdatePhase]
    UPDATE_PHASE_ROLLED_BACK: _ClassVar[UpdatePhase]
    UPDATE_PHASE_ABORTED: _ClassVar[UpdatePhase]

class UpdateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_KIND_UNSPECIFIED: _ClassVar[UpdateKind]
    UPDATE_KIND_FLEET: _ClassVar[UpdateKind]
    UPDATE_KIND_ROLLBACK: _ClassVar[UpdateKind]
    UPDATE_KIND_CATCH_UP: _ClassVar[UpdateKind]

class FailurePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_POLICY_UNSPECIFIED: _ClassVar[FailurePolicy]
    FAILURE_POLICY_ROLLBACK: _ClassVar[FailurePolicy]
    FAILURE_POLICY_EVICT: _ClassVar[FailurePolicy]

class Inflight(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INFLIGHT_UNSPECIFIED: _ClassVar[Inflight]
    INFLIGHT_RECOMPUTE: _ClassVar[Inflight]
    INFLIGHT_DRAIN: _ClassVar[Inflight]
    INFLIGHT_ABORT: _ClassVar[Inflight]
    INFLIGHT_KEEP: _ClassVar[Inflight]

class ReplicaOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_OUTCOME_UNSPECIFIED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_STAGING: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_PREPARED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_APPLYING: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_APPLIED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_FAILED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_RESTORING: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_RESTORED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_DIVERGED: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_TORN: _ClassVar[ReplicaOutcome]
    REPLICA_OUTCOME_EXCLUDED: _ClassVar[ReplicaOutcome]
UPDATE_PHASE_UNSPECIFIED: UpdatePhase
UPDATE_PHASE_STAGING: UpdatePhase
UPDATE_PHASE_APPLYING: UpdatePhase
UPDATE_PHASE_COMMITTED: UpdatePhase
UPDATE_PHASE_ROLLING_BACK: UpdatePhase
UPDATE_PHASE_ROLLED_BACK: UpdatePhase
UPDATE_PHASE_ABORTED: UpdatePhase
UPDATE_KIND_UNSPECIFIED: UpdateKind
UPDATE_KIND_FLEET: UpdateKind
UPDATE_KIND_ROLLBACK: UpdateKind
UPDATE_KIND_CATCH_UP: UpdateKind
FAILURE_POLICY_UNSPECIFIED: FailurePolicy
FAILURE_POLICY_ROLLBACK: FailurePolicy
FAILURE_POLICY_EVICT: FailurePolicy
INFLIGHT_UNSPECIFIED: Inflight
INFLIGHT_RECOMPUTE: Inflight
INFLIGHT_DRAIN: Inflight
INFLIGHT_ABORT: Inflight
INFLIGHT_KEEP: Inflight
REPLICA_OUTCOME_UNSPECIFIED: ReplicaOutcome
REPLICA_OUTCOME_STAGING: ReplicaOutcome
REPLICA_OUTCOME_PREPARED: ReplicaOutcome
REPLICA_OUTCOME_APPLYING: ReplicaOutcome
REPLICA_OUTCOME_APPLIED: ReplicaOutcome
REPLICA_OUTCOME_FAILED: ReplicaOutcome
REPLICA_OUTCOME_RESTORING: ReplicaOutcome
REPLICA_OUTCOME_RESTORED: ReplicaOutcome
REPLICA_OUTCOME_DIVERGED: ReplicaOutcome
REPLICA_OUTCOME_TORN: ReplicaOutcome
REPLICA_OUTCOME_EXCLUDED: ReplicaOutcome

class UpdateOptions(_message.Message):
    __slots__ = ("failure_policy", "inflight", "canary", "max_unavailable", "max_failed", "staging_deadline_s", "quiesce_deadline_s", "apply_deadline_s", "check_finite", "asleep_deadline_s")
    FAILURE_POLICY_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    MAX_UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    MAX_FAILED_FIELD_NUMBER: _ClassVar[int]
    STAGING_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    QUIESCE_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    APPLY_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CHECK_FINITE_FIELD_NUMBER: _ClassVar[int]
    ASLEEP_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    failure_policy: FailurePolicy
    inflight: Inflight
    canary: int
    max_unavailable: str
    max_failed: str
    staging_deadline_s: float
    quiesce_deadline_s: float
    apply_deadline_s: float
    check_finite: bool
    asleep_deadline_s: float
    def __init__(self, failure_policy: _Optional[_Union[FailurePolicy, str]] = ..., inflight: _Optional[_Union[Inflight, str]] = ..., canary: _Optional[int] = ..., max_unavailable: _Optional[str] = ..., max_failed: _Optional[str] = ..., staging_deadline_s: _Optional[float] = ..., quiesce_deadline_s: _Optional[float] = ..., apply_deadline_s: _Optional[float] = ..., check_finite: bool = ..., asleep_deadline_s: _Optional[float] = ...) -> None: ...

class WindowTimes(_message.Message):
    __slots__ = ("quiesce_ms", "apply_ms", "resume_ms", "total_ms")
    QUIESCE_MS_FIELD_NUMBER: _ClassVar[int]
    APPLY_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    quiesce_ms: float
    apply_ms: float
    resume_ms: float
    total_ms: float
    def __init__(self, quiesce_ms: _Optional[float] = ..., apply_ms: _Optional[float] = ..., resume_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class UpdateReplica(_message.Message):
    __slots__ = ("replica_id", "wave", "outcome", "reason", "window")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    wave: int
    outcome: ReplicaOutcome
    reason: str
    window: WindowTimes
    def __init__(self, replica_id: _Optional[str] = ..., wave: _Optional[int] = ..., outcome: _Optional[_Union[ReplicaOutcome, str]] = ..., reason: _Optional[str] = ..., window: _Optional[_Union[WindowTimes, _Mapping]] = ...) -> None: ...

class UpdateNode(_message.Message):
    __slots__ = ("node_id", "bytes_done", "bytes_total", "staged", "source_node_id", "bytes_per_s", "wire_bytes", "transport")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    bytes_done: int
    bytes_total: int
    staged: bool
    source_node_id: str
    bytes_per_s: float
    wire_bytes: int
    transport: str
    def __init__(self, node_id: _Optional[str] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., staged: bool = ..., source_node_id: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., wire_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("id", "model", "kind", "phase", "base_version", "target_version", "options", "reason", "wave", "wave_count", "replicas", "nodes", "started_at", "ended_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    WAVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    kind: UpdateKind
    phase: UpdatePhase
    base_version: str
    target_version: str
    options: UpdateOptions
    reason: str
    wave: int
    wave_count: int
    replicas: _containers.RepeatedCompositeFieldContainer[UpdateReplica]
    nodes: _containers.RepeatedCompositeFieldContainer[UpdateNode]
    started_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., kind: _Optional[_Union[UpdateKind, str]] = ..., phase: _Optional[_Union[UpdatePhase, str]] = ..., base_version: _Optional[str] = ..., target_version: _Optional[str] = ..., options: _Optional[_Union[UpdateOptions, _Mapping]] = ..., reason: _Optional[str] = ..., wave: _Optional[int] = ..., wave_count: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[UpdateReplica, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[UpdateNode, _Mapping]]] = ..., started_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("model", "base_version", "target_version", "nodes", "waves", "notes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    WAVES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    base_version: str
    target_version: str
    nodes: _containers.RepeatedCompositeFieldContainer[PlanNode]
    waves: _containers.RepeatedCompositeFieldContainer[PlanWave]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., base_version: _Optional[str] = ..., target_version: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[PlanNode, _Mapping]]] = ..., waves: _Optional[_Iterable[_Union[PlanWave, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanNode(_message.Message):
    __slots__ = ("node_id", "fetch_bytes", "fetch_buckets", "source_node_ids", "unchanged_bytes")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    FETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    fetch_bytes: int
    fetch_buckets: int
    source_node_ids: _containers.RepeatedScalarFieldContainer[str]
    unchanged_bytes: int
    def __init__(self, node_id: _Optional[str] = ..., fetch_bytes: _Optional[int] = ..., fetch_buckets: _Optional[int] = ..., source_node_ids: _Optional[_Iterable[str]] = ..., unchanged_bytes: _Optional[int] = ...) -> None: ...

class PlanWave(_message.Message):
    __slots__ = ("replica_ids",)
    REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    replica_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replica_ids: _Optional[_Iterable[str]] = ...) -> None: ...
