from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComponentRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPONENT_ROLE_UNSPECIFIED: _ClassVar[ComponentRole]
    COMPONENT_ROLE_TARGET: _ClassVar[ComponentRole]
    COMPONENT_ROLE_DRAFT: _ClassVar[ComponentRole]
    COMPONENT_ROLE_ADAPTER: _ClassVar[ComponentRole]
COMPONENT_ROLE_UNSPECIFIED: ComponentRole
COMPONENT_ROLE_TARGET: ComponentRole
COMPONENT_ROLE_DRAFT: ComponentRole
COMPONENT_ROLE_ADAPTER: ComponentRole

class Manifest(_message.Message):
    __slots__ = ("format", "bucket_bytes", "components", "files", "tensors", "buckets")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    format: str
    bucket_bytes: int
    components: _containers.RepeatedCompositeFieldContainer[Component]
    files: _containers.RepeatedCompositeFieldContainer[ImageFile]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    def __init__(self, format: _Optional[str] = ..., bucket_bytes: _Optional[int] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[ImageFile, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "role")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: ComponentRole
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[ComponentRole, str]] = ...) -> None: ...

class ImageFile(_message.Message):
    __slots__ = ("name", "size_bytes", "weights")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    weights: bool
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., weights: bool = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "file", "offset", "size_bytes", "digest", "component")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    file: int
    offset: int
    size_bytes: int
    digest: bytes
    component: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., file: _Optional[int] = ..., offset: _Optional[int] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., component: _Optional[int] = ...) -> None: ...

class Bucket(_message.Message):
    __slots__ = ("file", "offset", "size_bytes", "digest")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    file: int
    offset: int
    size_bytes: int
    digest: bytes
    def __init__(self, file: _Optional[int] = ..., offset: _Optional[int] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class ManifestPage(_message.Message):
    __slots__ = ("index", "count", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
