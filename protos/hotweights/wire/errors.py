"""Errors as both sides know them: a gRPC status with google.rpc.ErrorInfo, and back.

server:  raise Refused(...)  ->  status + ErrorInfo(reason, domain, metadata)  ->  client: Refused
"""

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "hotweights"
_DETAILS_KEY = "grpc-status-details-bin"

# The outcome of a call that ends in one of these is unknown: the same request_id may be sent again.
_UNREACHABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
}


class HotweightsError(Exception):
    """What every error of this package is."""


class Refused(HotweightsError):
    """The request was understood and declined; sending it again will not help.

    `reason` is a word in capitals (VERSION_EXISTS), `code` the gRPC status, `fields` what the text
    was built from.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        **fields: str,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.fields: Mapping[str, str] = fields


class Unreachable(HotweightsError):
    """No answer came: whether the request took effect is unknown."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(f"{what}: {message}")
        self.what = what


def to_metadata(refused: Refused) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that carries the rich form of a refusal."""
    info = error_details_pb2.ErrorInfo(reason=refused.reason, domain=DOMAIN, metadata=dict(refused.fields))
    detail = any_pb2.Any()
    detail.Pack(info)
    code: int = refused.code.value[0]
    status = status_pb2.Status(code=code, message=refused.message, details=[detail])
    return ((_DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError, what: str) -> HotweightsError:
    """The error of this package for a failed call; `what` names the peer for a person."""
    code, text = error.code(), error.details() or error.code().name
    if code in _UNREACHABLE:
        return Unreachable(what, text)
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                break  # not ours, or garbled on the way: the plain status still says what happened
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return Refused(code, info.reason, status.message, **dict(info.metadata))
    return Refused(code, code.name, text)
