from hotweights.v1 import fleet_pb2 as _fleet_pb2
from hotweights.v1 import model_pb2 as _model_pb2
from hotweights.v1 import update_pb2 as _update_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ApplyFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    APPLY_FAILURE_UNSPECIFIED: _ClassVar[ApplyFailure]
    APPLY_FAILURE_EXPIRED: _ClassVar[ApplyFailure]
    APPLY_FAILURE_UNDONE: _ClassVar[ApplyFailure]
    APPLY_FAILURE_TORN: _ClassVar[ApplyFailure]
APPLY_FAILURE_UNSPECIFIED: ApplyFailure
APPLY_FAILURE_EXPIRED: ApplyFailure
APPLY_FAILURE_UNDONE: ApplyFailure
APPLY_FAILURE_TORN: ApplyFailure

class SessionRequest(_message.Message):
    __slots__ = ("hello", "heartbeat", "answer", "report")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    answer: Answer
    report: Report
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "order")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    order: Order
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., order: _Optional[_Union[Order, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("incarnation", "cluster_id", "last_epoch", "last_revision", "agent", "replica")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_REVISION_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    cluster_id: str
    last_epoch: int
    last_revision: int
    agent: AgentHello
    replica: ReplicaHello
    def __init__(self, incarnation: _Optional[str] = ..., cluster_id: _Optional[str] = ..., last_epoch: _Optional[int] = ..., last_revision: _Optional[int] = ..., agent: _Optional[_Union[AgentHello, _Mapping]] = ..., replica: _Optional[_Union[ReplicaHello, _Mapping]] = ...) -> None: ...

class AgentHello(_message.Message):
    __slots__ = ("node_id", "data_endpoint", "held_digests", "stage_bytes_used", "stage_bytes_free", "token_key", "zone")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_KEY_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    data_endpoint: str
    held_digests: _containers.RepeatedScalarFieldContainer[bytes]
    stage_bytes_used: int
    stage_bytes_free: int
    token_key: bytes
    zone: str
    def __init__(self, node_id: _Optional[str] = ..., data_endpoint: _Optional[str] = ..., held_digests: _Optional[_Iterable[bytes]] = ..., stage_bytes_used: _Optional[int] = ..., stage_bytes_free: _Optional[int] = ..., token_key: _Optional[bytes] = ..., zone: _Optional[str] = ...) -> None: ...

class ReplicaHello(_message.Message):
    __slots__ = ("replica_id", "model", "policy", "active_digest", "ranks", "engine", "open_window", "fingerprints", "identifying", "fingerprint_kind")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    OPEN_WINDOW_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    IDENTIFYING_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_KIND_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model: str
    policy: _model_pb2.ModelPolicy
    active_digest: bytes
    ranks: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Rank]
    engine: str
    open_window: str
    fingerprints: _containers.RepeatedScalarFieldContainer[bytes]
    identifying: bool
    fingerprint_kind: str
    def __init__(self, replica_id: _Optional[str] = ..., model: _Optional[str] = ..., policy: _Optional[_Union[_model_pb2.ModelPolicy, str]] = ..., active_digest: _Optional[bytes] = ..., ranks: _Optional[_Iterable[_Union[_fleet_pb2.Rank, _Mapping]]] = ..., engine: _Optional[str] = ..., open_window: _Optional[str] = ..., fingerprints: _Optional[_Iterable[bytes]] = ..., identifying: bool = ..., fingerprint_kind: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session_id", "cluster_id", "epoch", "revision", "model", "heartbeat_s", "lease_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    cluster_id: str
    epoch: int
    revision: int
    model: str
    heartbeat_s: float
    lease_s: float
    def __init__(self, session_id: _Optional[str] = ..., cluster_id: _Optional[str] = ..., epoch: _Optional[int] = ..., revision: _Optional[int] = ..., model: _Optional[str] = ..., heartbeat_s: _Optional[float] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("last_revision",)
    LAST_REVISION_FIELD_NUMBER: _ClassVar[int]
    last_revision: int
    def __init__(self, last_revision: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "nonce", "refusal", "update_id", "epoch")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    number: int
    nonce: int
    refusal: str
    update_id: str
    epoch: int
    def __init__(self, number: _Optional[int] = ..., nonce: _Optional[int] = ..., refusal: _Optional[str] = ..., update_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("number", "nonce", "epoch", "revision", "update_id", "stage", "unpin", "prepare", "apply", "end")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    number: int
    nonce: int
    epoch: int
    revision: int
    update_id: str
    stage: StageImage
    unpin: UnpinImages
    prepare: PrepareImage
    apply: ApplyImage
    end: EndUpdate
    def __init__(self, number: _Optional[int] = ..., nonce: _Optional[int] = ..., epoch: _Optional[int] = ..., revision: _Optional[int] = ..., update_id: _Optional[str] = ..., stage: _Optional[_Union[StageImage, _Mapping]] = ..., unpin: _Optional[_Union[UnpinImages, _Mapping]] = ..., prepare: _Optional[_Union[PrepareImage, _Mapping]] = ..., apply: _Optional[_Union[ApplyImage, _Mapping]] = ..., end: _Optional[_Union[EndUpdate, _Mapping]] = ...) -> None: ...

class StageImage(_message.Message):
    __slots__ = ("manifest_digest", "sources", "deadline_s")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    deadline_s: float
    def __init__(self, manifest_digest: _Optional[bytes] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("node_id", "data_endpoint", "token", "staging")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    data_endpoint: str
    token: bytes
    staging: bool
    def __init__(self, node_id: _Optional[str] = ..., data_endpoint: _Optional[str] = ..., token: _Optional[bytes] = ..., staging: bool = ...) -> None: ...

class UnpinImages(_message.Message):
    __slots__ = ("pinned_digests",)
    PINNED_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    pinned_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, pinned_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PrepareImage(_message.Message):
    __slots__ = ("manifest_digest", "deadline_s", "check_finite")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CHECK_FINITE_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    deadline_s: float
    check_finite: bool
    def __init__(self, manifest_digest: _Optional[bytes] = ..., deadline_s: _Optional[float] = ..., check_finite: bool = ...) -> None: ...

class ApplyImage(_message.Message):
    __slots__ = ("manifest_digest", "version", "inflight", "validity_s", "quiesce_deadline_s", "apply_deadline_s", "restore", "asleep_deadline_s")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    VALIDITY_S_FIELD_NUMBER: _ClassVar[int]
    QUIESCE_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    APPLY_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    ASLEEP_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    version: str
    inflight: _update_pb2.Inflight
    validity_s: float
    quiesce_deadline_s: float
    apply_deadline_s: float
    restore: bool
    asleep_deadline_s: float
    def __init__(self, manifest_digest: _Optional[bytes] = ..., version: _Optional[str] = ..., inflight: _Optional[_Union[_update_pb2.Inflight, str]] = ..., validity_s: _Optional[float] = ..., quiesce_deadline_s: _Optional[float] = ..., apply_deadline_s: _Optional[float] = ..., restore: bool = ..., asleep_deadline_s: _Optional[float] = ...) -> None: ...

class EndUpdate(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    def __init__(self, committed: bool = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("number", "update_id", "epoch", "stage_progress", "staged", "stage_failed", "images_held", "prepared", "prepare_failed", "applied", "apply_failed", "active_changed", "deferred", "peer_refused", "source_left")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FAILED_FIELD_NUMBER: _ClassVar[int]
    IMAGES_HELD_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FAILED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    APPLY_FAILED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DEFERRED_FIELD_NUMBER: _ClassVar[int]
    PEER_REFUSED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LEFT_FIELD_NUMBER: _ClassVar[int]
    number: int
    update_id: str
    epoch: int
    stage_progress: StageProgress
    staged: Staged
    stage_failed: StageFailed
    images_held: ImagesHeld
    prepared: Prepared
    prepare_failed: PrepareFailed
    applied: Applied
    apply_failed: ApplyFailed
    active_changed: ActiveChanged
    deferred: Deferred
    peer_refused: PeerRefused
    source_left: SourceLeft
    def __init__(self, number: _Optional[int] = ..., update_id: _Optional[str] = ..., epoch: _Optional[int] = ..., stage_progress: _Optional[_Union[StageProgress, _Mapping]] = ..., staged: _Optional[_Union[Staged, _Mapping]] = ..., stage_failed: _Optional[_Union[StageFailed, _Mapping]] = ..., images_held: _Optional[_Union[ImagesHeld, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., prepare_failed: _Optional[_Union[PrepareFailed, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ..., apply_failed: _Optional[_Union[ApplyFailed, _Mapping]] = ..., active_changed: _Optional[_Union[ActiveChanged, _Mapping]] = ..., deferred: _Optional[_Union[Deferred, _Mapping]] = ..., peer_refused: _Optional[_Union[PeerRefused, _Mapping]] = ..., source_left: _Optional[_Union[SourceLeft, _Mapping]] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("manifest_digest", "bytes_done", "bytes_total", "source_node_id", "bytes_per_s", "wire_bytes", "transport")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    bytes_done: int
    bytes_total: int
    source_node_id: str
    bytes_per_s: float
    wire_bytes: int
    transport: str
    def __init__(self, manifest_digest: _Optional[bytes] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., source_node_id: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., wire_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class SourceLeft(_message.Message):
    __slots__ = ("manifest_digest", "source_node_id", "reason", "lied")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LIED_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    source_node_id: str
    reason: str
    lied: bool
    def __init__(self, manifest_digest: _Optional[bytes] = ..., source_node_id: _Optional[str] = ..., reason: _Optional[str] = ..., lied: bool = ...) -> None: ...

class Staged(_message.Message):
    __slots__ = ("manifest_digest",)
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    def __init__(self, manifest_digest: _Optional[bytes] = ...) -> None: ...

class StageFailed(_message.Message):
    __slots__ = ("manifest_digest", "reason")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    reason: str
    def __init__(self, manifest_digest: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class ImagesHeld(_message.Message):
    __slots__ = ("digests", "stage_bytes_used", "stage_bytes_free")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    stage_bytes_used: int
    stage_bytes_free: int
    def __init__(self, digests: _Optional[_Iterable[bytes]] = ..., stage_bytes_used: _Optional[int] = ..., stage_bytes_free: _Optional[int] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("manifest_digest", "base_digest", "routes")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    base_digest: bytes
    routes: _fleet_pb2.Routes
    def __init__(self, manifest_digest: _Optional[bytes] = ..., base_digest: _Optional[bytes] = ..., routes: _Optional[_Union[_fleet_pb2.Routes, _Mapping]] = ...) -> None: ...

class PrepareFailed(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("active_digest", "fingerprints", "window", "note")
    ACTIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    active_digest: bytes
    fingerprints: _containers.RepeatedScalarFieldContainer[bytes]
    window: _update_pb2.WindowTimes
    note: str
    def __init__(self, active_digest: _Optional[bytes] = ..., fingerprints: _Optional[_Iterable[bytes]] = ..., window: _Optional[_Union[_update_pb2.WindowTimes, _Mapping]] = ..., note: _Optional[str] = ...) -> None: ...

class Deferred(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ApplyFailed(_message.Message):
    __slots__ = ("failure", "reason", "active_digest", "window")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    failure: ApplyFailure
    reason: str
    active_digest: bytes
    window: _update_pb2.WindowTimes
    def __init__(self, failure: _Optional[_Union[ApplyFailure, str]] = ..., reason: _Optional[str] = ..., active_digest: _Optional[bytes] = ..., window: _Optional[_Union[_update_pb2.WindowTimes, _Mapping]] = ...) -> None: ...

class ActiveChanged(_message.Message):
    __slots__ = ("active_digest", "fingerprints", "note")
    ACTIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    active_digest: bytes
    fingerprints: _containers.RepeatedScalarFieldContainer[bytes]
    note: str
    def __init__(self, active_digest: _Optional[bytes] = ..., fingerprints: _Optional[_Iterable[bytes]] = ..., note: _Optional[str] = ...) -> None: ...

class PeerRefused(_message.Message):
    __slots__ = ("refusal",)
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    refusal: _fleet_pb2.Refusal
    def __init__(self, refusal: _Optional[_Union[_fleet_pb2.Refusal, _Mapping]] = ...) -> None: ...
