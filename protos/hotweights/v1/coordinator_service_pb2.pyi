from hotweights.v1 import fleet_pb2 as _fleet_pb2
from hotweights.v1 import manifest_pb2 as _manifest_pb2
from hotweights.v1 import model_pb2 as _model_pb2
from hotweights.v1 import update_pb2 as _update_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PublishVersionRequest(_message.Message):
    __slots__ = ("header", "page")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    header: PublishHeader
    page: _manifest_pb2.ManifestPage
    def __init__(self, header: _Optional[_Union[PublishHeader, _Mapping]] = ..., page: _Optional[_Union[_manifest_pb2.ManifestPage, _Mapping]] = ...) -> None: ...

class PublishHeader(_message.Message):
    __slots__ = ("model", "version", "manifest_digest", "request_id", "start_update", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    START_UPDATE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    manifest_digest: bytes
    request_id: str
    start_update: bool
    options: _update_pb2.UpdateOptions
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., manifest_digest: _Optional[bytes] = ..., request_id: _Optional[str] = ..., start_update: bool = ..., options: _Optional[_Union[_update_pb2.UpdateOptions, _Mapping]] = ...) -> None: ...

class PublishVersionResponse(_message.Message):
    __slots__ = ("version", "existed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    version: _model_pb2.Version
    existed: bool
    def __init__(self, version: _Optional[_Union[_model_pb2.Version, _Mapping]] = ..., existed: bool = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: _model_pb2.Version
    def __init__(self, version: _Optional[_Union[_model_pb2.Version, _Mapping]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("model", "page_size", "page_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    page_token: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions", "next_page_token")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[_model_pb2.Version]
    next_page_token: str
    def __init__(self, versions: _Optional[_Iterable[_Union[_model_pb2.Version, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteVersionRequest(_message.Message):
    __slots__ = ("model", "version", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    request_id: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class DeleteVersionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetManifestRequest(_message.Message):
    __slots__ = ("manifest_digest",)
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    def __init__(self, manifest_digest: _Optional[bytes] = ...) -> None: ...

class GetManifestResponse(_message.Message):
    __slots__ = ("page",)
    PAGE_FIELD_NUMBER: _ClassVar[int]
    page: _manifest_pb2.ManifestPage
    def __init__(self, page: _Optional[_Union[_manifest_pb2.ManifestPage, _Mapping]] = ...) -> None: ...

class StartUpdateRequest(_message.Message):
    __slots__ = ("model", "version", "options", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    options: _update_pb2.UpdateOptions
    request_id: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., options: _Optional[_Union[_update_pb2.UpdateOptions, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class StartUpdateResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: _update_pb2.Update
    def __init__(self, update: _Optional[_Union[_update_pb2.Update, _Mapping]] = ...) -> None: ...

class GetUpdateRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetUpdateResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: _update_pb2.Update
    def __init__(self, update: _Optional[_Union[_update_pb2.Update, _Mapping]] = ...) -> None: ...

class ListUpdatesRequest(_message.Message):
    __slots__ = ("model", "page_size", "page_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    page_token: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListUpdatesResponse(_message.Message):
    __slots__ = ("updates", "next_page_token")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[_update_pb2.Update]
    next_page_token: str
    def __init__(self, updates: _Optional[_Iterable[_Union[_update_pb2.Update, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelUpdateRequest(_message.Message):
    __slots__ = ("id", "request_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class CancelUpdateResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: _update_pb2.Update
    def __init__(self, update: _Optional[_Union[_update_pb2.Update, _Mapping]] = ...) -> None: ...

class RollBackRequest(_message.Message):
    __slots__ = ("model", "version", "options", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    options: _update_pb2.UpdateOptions
    request_id: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., options: _Optional[_Union[_update_pb2.UpdateOptions, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class RollBackResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: _update_pb2.Update
    def __init__(self, update: _Optional[_Union[_update_pb2.Update, _Mapping]] = ...) -> None: ...

class PlanUpdateRequest(_message.Message):
    __slots__ = ("model", "version", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    options: _update_pb2.UpdateOptions
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., options: _Optional[_Union[_update_pb2.UpdateOptions, _Mapping]] = ...) -> None: ...

class PlanUpdateResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: _update_pb2.Plan
    def __init__(self, plan: _Optional[_Union[_update_pb2.Plan, _Mapping]] = ...) -> None: ...

class SetModelPolicyRequest(_message.Message):
    __slots__ = ("model", "policy", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    policy: _model_pb2.ModelPolicy
    request_id: str
    def __init__(self, model: _Optional[str] = ..., policy: _Optional[_Union[_model_pb2.ModelPolicy, str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class SetModelPolicyResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.Model
    def __init__(self, model: _Optional[_Union[_model_pb2.Model, _Mapping]] = ...) -> None: ...

class ResumeModelRequest(_message.Message):
    __slots__ = ("model", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class ResumeModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.Model
    def __init__(self, model: _Optional[_Union[_model_pb2.Model, _Mapping]] = ...) -> None: ...

class UndrainReplicaRequest(_message.Message):
    __slots__ = ("replica_id", "request_id")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    request_id: str
    def __init__(self, replica_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class UndrainReplicaResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: _fleet_pb2.Replica
    def __init__(self, replica: _Optional[_Union[_fleet_pb2.Replica, _Mapping]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("model", "event_count")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EVENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    model: str
    event_count: int
    def __init__(self, model: _Optional[str] = ..., event_count: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("cluster_id", "epoch", "revision", "software_version", "models", "versions", "updates", "nodes", "replicas", "events")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    epoch: int
    revision: int
    software_version: str
    models: _containers.RepeatedCompositeFieldContainer[_model_pb2.Model]
    versions: _containers.RepeatedCompositeFieldContainer[_model_pb2.Version]
    updates: _containers.RepeatedCompositeFieldContainer[_update_pb2.Update]
    nodes: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Node]
    replicas: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Replica]
    events: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Event]
    def __init__(self, cluster_id: _Optional[str] = ..., epoch: _Optional[int] = ..., revision: _Optional[int] = ..., software_version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[_model_pb2.Model, _Mapping]]] = ..., versions: _Optional[_Iterable[_Union[_model_pb2.Version, _Mapping]]] = ..., updates: _Optional[_Iterable[_Union[_update_pb2.Update, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[_fleet_pb2.Node, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[_fleet_pb2.Replica, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[_fleet_pb2.Event, _Mapping]]] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ("model", "page_size", "page_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    page_token: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas", "next_page_token")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Replica]
    next_page_token: str
    def __init__(self, replicas: _Optional[_Iterable[_Union[_fleet_pb2.Replica, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes", "next_page_token")
    NODES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Node]
    next_page_token: str
    def __init__(self, nodes: _Optional[_Iterable[_Union[_fleet_pb2.Node, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("from_revision", "model")
    FROM_REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    from_revision: int
    model: str
    def __init__(self, from_revision: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class WatchEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[_fleet_pb2.Event]
    def __init__(self, events: _Optional[_Iterable[_Union[_fleet_pb2.Event, _Mapping]]] = ...) -> None: ...
