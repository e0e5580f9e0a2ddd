from google.protobuf import timestamp_pb2 as _timestamp_pb2
from hotweights.v1 import update_pb2 as _update_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_VERSION_PUBLISHED: _ClassVar[EventKind]
    EVENT_KIND_VERSION_AVAILABLE: _ClassVar[EventKind]
    EVENT_KIND_VERSION_UNAVAILABLE: _ClassVar[EventKind]
    EVENT_KIND_VERSION_DELETED: _ClassVar[EventKind]
    EVENT_KIND_UPDATE_STARTED: _ClassVar[EventKind]
    EVENT_KIND_UPDATE_PHASE: _ClassVar[EventKind]
    EVENT_KIND_UPDATE_ENDED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_ATTACHED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_DETACHED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_APPLIED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_FAILED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_RESTORED: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_EXCLUDED: _ClassVar[EventKind]
    EVENT_KIND_NODE_ATTACHED: _ClassVar[EventKind]
    EVENT_KIND_NODE_DETACHED: _ClassVar[EventKind]
    EVENT_KIND_NODE_STAGED: _ClassVar[EventKind]
    EVENT_KIND_MODEL_POLICY: _ClassVar[EventKind]
    EVENT_KIND_REPLICA_DEFERRED: _ClassVar[EventKind]
    EVENT_KIND_CALL_REFUSED: _ClassVar[EventKind]
    EVENT_KIND_SOURCE_LEFT: _ClassVar[EventKind]
    EVENT_KIND_NODE_QUARANTINED: _ClassVar[EventKind]
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_VERSION_PUBLISHED: EventKind
EVENT_KIND_VERSION_AVAILABLE: EventKind
EVENT_KIND_VERSION_UNAVAILABLE: EventKind
EVENT_KIND_VERSION_DELETED: EventKind
EVENT_KIND_UPDATE_STARTED: EventKind
EVENT_KIND_UPDATE_PHASE: EventKind
EVENT_KIND_UPDATE_ENDED: EventKind
EVENT_KIND_REPLICA_ATTACHED: EventKind
EVENT_KIND_REPLICA_DETACHED: EventKind
EVENT_KIND_REPLICA_APPLIED: EventKind
EVENT_KIND_REPLICA_FAILED: EventKind
EVENT_KIND_REPLICA_RESTORED: EventKind
EVENT_KIND_REPLICA_EXCLUDED: EventKind
EVENT_KIND_NODE_ATTACHED: EventKind
EVENT_KIND_NODE_DETACHED: EventKind
EVENT_KIND_NODE_STAGED: EventKind
EVENT_KIND_MODEL_POLICY: EventKind
EVENT_KIND_REPLICA_DEFERRED: EventKind
EVENT_KIND_CALL_REFUSED: EventKind
EVENT_KIND_SOURCE_LEFT: EventKind
EVENT_KIND_NODE_QUARANTINED: EventKind

class Rank(_message.Message):
    __slots__ = ("index", "node_id", "pid")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    index: int
    node_id: str
    pid: int
    def __init__(self, index: _Optional[int] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Routes(_message.Message):
    __slots__ = ("direct_modules", "direct_bytes", "assembled_modules", "assembled_bytes", "reload_modules", "reload_bytes", "reasons", "sources")
    DIRECT_MODULES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ASSEMBLED_MODULES_FIELD_NUMBER: _ClassVar[int]
    ASSEMBLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RELOAD_MODULES_FIELD_NUMBER: _ClassVar[int]
    RELOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    direct_modules: int
    direct_bytes: int
    assembled_modules: int
    assembled_bytes: int
    reload_modules: int
    reload_bytes: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, direct_modules: _Optional[int] = ..., direct_bytes: _Optional[int] = ..., assembled_modules: _Optional[int] = ..., assembled_bytes: _Optional[int] = ..., reload_modules: _Optional[int] = ..., reload_bytes: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "model", "connected", "ready", "excluded", "desired_version", "active_version", "active_digest", "last_window", "fingerprints", "ranks", "engine", "note", "routes", "fingerprint_kind")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    DESIRED_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAST_WINDOW_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_KIND_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    connected: bool
    ready: bool
    excluded: bool
    desired_version: str
    active_version: str
    active_digest: bytes
    last_window: _update_pb2.WindowTimes
    fingerprints: _containers.RepeatedScalarFieldContainer[bytes]
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    engine: str
    note: str
    routes: Routes
    fingerprint_kind: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., connected: bool = ..., ready: bool = ..., excluded: bool = ..., desired_version: _Optional[str] = ..., active_version: _Optional[str] = ..., active_digest: _Optional[bytes] = ..., last_window: _Optional[_Union[_update_pb2.WindowTimes, _Mapping]] = ..., fingerprints: _Optional[_Iterable[bytes]] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., engine: _Optional[str] = ..., note: _Optional[str] = ..., routes: _Optional[_Union[Routes, _Mapping]] = ..., fingerprint_kind: _Optional[str] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "connected", "data_endpoint", "held_digests", "stage_bytes_used", "stage_bytes_free", "quarantine", "zone")
    ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    DATA_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    id: str
    connected: bool
    data_endpoint: str
    held_digests: _containers.RepeatedScalarFieldContainer[bytes]
    stage_bytes_used: int
    stage_bytes_free: int
    quarantine: str
    zone: str
    def __init__(self, id: _Optional[str] = ..., connected: bool = ..., data_endpoint: _Optional[str] = ..., held_digests: _Optional[_Iterable[bytes]] = ..., stage_bytes_used: _Optional[int] = ..., stage_bytes_free: _Optional[int] = ..., quarantine: _Optional[str] = ..., zone: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("revision", "at", "kind", "model", "version", "update_id", "replica_id", "node_id", "message", "window", "refusal")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    revision: int
    at: _timestamp_pb2.Timestamp
    kind: EventKind
    model: str
    version: str
    update_id: str
    replica_id: str
    node_id: str
    message: str
    window: _update_pb2.WindowTimes
    refusal: Refusal
    def __init__(self, revision: _Optional[int] = ..., at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EventKind, str]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., update_id: _Optional[str] = ..., replica_id: _Optional[str] = ..., node_id: _Optional[str] = ..., message: _Optional[str] = ..., window: _Optional[_Union[_update_pb2.WindowTimes, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("peer", "name", "role", "method", "reason", "passed_over")
    PEER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    peer: str
    name: str
    role: str
    method: str
    reason: str
    passed_over: int
    def __init__(self, peer: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ..., method: _Optional[str] = ..., reason: _Optional[str] = ..., passed_over: _Optional[int] = ...) -> None: ...
