"""Records as JSON. The types of the fields are the description; unknown fields are an error."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


def encode(record: object) -> bytes:
    """A frozen dataclass as JSON."""
    return json.dumps(_plain(record), separators=(",", ":")).encode()


def decode(kind: type[T], data: bytes) -> T:
    """The record again. Raises ValueError when it is not one of that kind."""
    try:
        value = _typed(kind, json.loads(data))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no {kind.__name__} in the store's record: {error}") from error
    assert isinstance(value, kind)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        return tuple(_typed(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _typed(arguments[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if is_dataclass(hint):
        hints = _hints(typing.cast(type, hint))
        return typing.cast(Any, hint)(**{k: _typed(hints[k], item) for k, item in value.items()})
    return float(value) if hint is float else value
