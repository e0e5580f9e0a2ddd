from hotweights.v1 import model_pb2 as _model_pb2
from hotweights.v1 import update_pb2 as _update_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HashProgress(_message.Message):
    __slots__ = ("bytes_done", "bytes_total")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class PublishFolderRequest(_message.Message):
    __slots__ = ("folder", "model", "version", "start_update", "options", "request_id", "include_code")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_UPDATE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_CODE_FIELD_NUMBER: _ClassVar[int]
    folder: str
    model: str
    version: str
    start_update: bool
    options: _update_pb2.UpdateOptions
    request_id: str
    include_code: bool
    def __init__(self, folder: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., start_update: bool = ..., options: _Optional[_Union[_update_pb2.UpdateOptions, _Mapping]] = ..., request_id: _Optional[str] = ..., include_code: bool = ...) -> None: ...

class PublishFolderResponse(_message.Message):
    __slots__ = ("progress", "version")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    progress: HashProgress
    version: _model_pb2.Version
    def __init__(self, progress: _Optional[_Union[HashProgress, _Mapping]] = ..., version: _Optional[_Union[_model_pb2.Version, _Mapping]] = ...) -> None: ...

class IdentifyFolderRequest(_message.Message):
    __slots__ = ("folder",)
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    folder: str
    def __init__(self, folder: _Optional[str] = ...) -> None: ...

class IdentifyFolderResponse(_message.Message):
    __slots__ = ("progress", "manifest_digest")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    progress: HashProgress
    manifest_digest: bytes
    def __init__(self, progress: _Optional[_Union[HashProgress, _Mapping]] = ..., manifest_digest: _Optional[bytes] = ...) -> None: ...

class StageImageRequest(_message.Message):
    __slots__ = ("manifest_digest",)
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    def __init__(self, manifest_digest: _Optional[bytes] = ...) -> None: ...

class StageImageResponse(_message.Message):
    __slots__ = ("bytes_done", "bytes_total", "staged")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    staged: bool
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., staged: bool = ...) -> None: ...

class MapImageRequest(_message.Message):
    __slots__ = ("manifest_digest", "client_id")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    client_id: str
    def __init__(self, manifest_digest: _Optional[bytes] = ..., client_id: _Optional[str] = ...) -> None: ...

class MapImageResponse(_message.Message):
    __slots__ = ("folder",)
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    folder: str
    def __init__(self, folder: _Optional[str] = ...) -> None: ...

class ReleaseImageRequest(_message.Message):
    __slots__ = ("manifest_digest", "client_id")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    client_id: str
    def __init__(self, manifest_digest: _Optional[bytes] = ..., client_id: _Optional[str] = ...) -> None: ...

class ReleaseImageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("device_uuid", "handle", "seal", "ranges")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    device_uuid: str
    handle: bytes
    seal: bytes
    ranges: _containers.RepeatedCompositeFieldContainer[DeviceRange]
    def __init__(self, device_uuid: _Optional[str] = ..., handle: _Optional[bytes] = ..., seal: _Optional[bytes] = ..., ranges: _Optional[_Iterable[_Union[DeviceRange, _Mapping]]] = ...) -> None: ...

class DeviceRange(_message.Message):
    __slots__ = ("file", "file_offset", "memory_offset", "size_bytes")
    FILE_FIELD_NUMBER: _ClassVar[int]
    FILE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MEMORY_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    file: str
    file_offset: int
    memory_offset: int
    size_bytes: int
    def __init__(self, file: _Optional[str] = ..., file_offset: _Optional[int] = ..., memory_offset: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class LendImageRequest(_message.Message):
    __slots__ = ("manifest_digest", "memories", "lease_s")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    memories: _containers.RepeatedCompositeFieldContainer[DeviceMemory]
    lease_s: float
    def __init__(self, manifest_digest: _Optional[bytes] = ..., memories: _Optional[_Iterable[_Union[DeviceMemory, _Mapping]]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class LendImageResponse(_message.Message):
    __slots__ = ("borrowers",)
    BORROWERS_FIELD_NUMBER: _ClassVar[int]
    borrowers: int
    def __init__(self, borrowers: _Optional[int] = ...) -> None: ...

class BorrowImageRequest(_message.Message):
    __slots__ = ("manifest_digest", "client_id", "upload")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    client_id: str
    upload: bool
    def __init__(self, manifest_digest: _Optional[bytes] = ..., client_id: _Optional[str] = ..., upload: bool = ...) -> None: ...

class BorrowImageResponse(_message.Message):
    __slots__ = ("memories", "left_s", "coming")
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[DeviceMemory]
    left_s: float
    coming: bool
    def __init__(self, memories: _Optional[_Iterable[_Union[DeviceMemory, _Mapping]]] = ..., left_s: _Optional[float] = ..., coming: bool = ...) -> None: ...

class ReturnImageRequest(_message.Message):
    __slots__ = ("manifest_digest", "client_id")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    client_id: str
    def __init__(self, manifest_digest: _Optional[bytes] = ..., client_id: _Optional[str] = ...) -> None: ...

class ReturnImageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetAgentStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetAgentStatusResponse(_message.Message):
    __slots__ = ("node_id", "data_endpoint", "coordinator_endpoint", "images", "folders", "stage_bytes_used", "stage_bytes_free", "pid")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    FOLDERS_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STAGE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    data_endpoint: str
    coordinator_endpoint: str
    images: _containers.RepeatedCompositeFieldContainer[StagedImage]
    folders: _containers.RepeatedCompositeFieldContainer[ServedFolder]
    stage_bytes_used: int
    stage_bytes_free: int
    pid: int
    def __init__(self, node_id: _Optional[str] = ..., data_endpoint: _Optional[str] = ..., coordinator_endpoint: _Optional[str] = ..., images: _Optional[_Iterable[_Union[StagedImage, _Mapping]]] = ..., folders: _Optional[_Iterable[_Union[ServedFolder, _Mapping]]] = ..., stage_bytes_used: _Optional[int] = ..., stage_bytes_free: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class StagedImage(_message.Message):
    __slots__ = ("manifest_digest", "size_bytes", "client_ids", "pinned")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_IDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: bytes
    size_bytes: int
    client_ids: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    def __init__(self, manifest_digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., client_ids: _Optional[_Iterable[str]] = ..., pinned: bool = ...) -> None: ...

class ServedFolder(_message.Message):
    __slots__ = ("folder", "manifest_digest", "model", "version")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    folder: str
    manifest_digest: bytes
    model: str
    version: str
    def __init__(self, folder: _Optional[str] = ..., manifest_digest: _Optional[bytes] = ..., model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...
