from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_POLICY_UNSPECIFIED: _ClassVar[ModelPolicy]
    MODEL_POLICY_MANUAL: _ClassVar[ModelPolicy]
    MODEL_POLICY_AUTO: _ClassVar[ModelPolicy]

class VersionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_STATE_UNSPECIFIED: _ClassVar[VersionState]
    VERSION_STATE_DECLARED: _ClassVar[VersionState]
    VERSION_STATE_AVAILABLE: _ClassVar[VersionState]
    VERSION_STATE_UNAVAILABLE: _ClassVar[VersionState]
MODEL_POLICY_UNSPECIFIED: ModelPolicy
MODEL_POLICY_MANUAL: ModelPolicy
MODEL_POLICY_AUTO: ModelPolicy
VERSION_STATE_UNSPECIFIED: VersionState
VERSION_STATE_DECLARED: VersionState
VERSION_STATE_AVAILABLE: VersionState
VERSION_STATE_UNAVAILABLE: VersionState

class Model(_message.Message):
    __slots__ = ("name", "policy", "held", "committed_version", "open_update_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    OPEN_UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    policy: ModelPolicy
    held: bool
    committed_version: str
    open_update_id: str
    def __init__(self, name: _Optional[str] = ..., policy: _Optional[_Union[ModelPolicy, str]] = ..., held: bool = ..., committed_version: _Optional[str] = ..., open_update_id: _Optional[str] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("model", "name", "sequence", "manifest_digest", "image_bytes", "tensor_count", "bucket_count", "state", "holder_node_ids", "published_at")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HOLDER_NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    sequence: int
    manifest_digest: bytes
    image_bytes: int
    tensor_count: int
    bucket_count: int
    state: VersionState
    holder_node_ids: _containers.RepeatedScalarFieldContainer[str]
    published_at: _timestamp_pb2.Timestamp
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., sequence: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., image_bytes: _Optional[int] = ..., tensor_count: _Optional[int] = ..., bucket_count: _Optional[int] = ..., state: _Optional[_Union[VersionState, str]] = ..., holder_node_ids: _Optional[_Iterable[str]] = ..., published_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
