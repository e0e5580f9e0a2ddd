"""Errors there and back: a Refused on one side is the same Refused on the other."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from hotweights.wire.errors import HotweightsError, Refused, Unreachable, from_rpc_error, to_metadata

KEY = "grpc-status-details-bin"


def failed(code: grpc.StatusCode, details: str | None, *trailing: tuple[str, Any]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


def test_a_refusal_comes_back_with_its_reason_and_fields() -> None:
    sent = Refused(grpc.StatusCode.ALREADY_EXISTS, "VERSION_EXISTS", "v1 exists, é", existing_digest="aa", other="")
    got = from_rpc_error(failed(sent.code, sent.message, *to_metadata(sent)), "the coordinator")
    assert isinstance(got, Refused)
    assert (got.code, got.reason, got.message) == (sent.code, sent.reason, sent.message)
    assert got.fields == {"existing_digest": "aa", "other": ""}
    assert str(got) == "v1 exists, é"


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
    ],
)
def test_where_the_outcome_is_unknown_the_peer_is_unreachable(code: grpc.StatusCode) -> None:
    got = from_rpc_error(failed(code, "gone"), "coordinator tcp://h:1")
    assert isinstance(got, Unreachable)
    assert str(got) == "coordinator tcp://h:1: gone"
    assert got.what == "coordinator tcp://h:1"


def test_a_failure_without_text_says_its_code() -> None:
    assert "UNAVAILABLE" in str(from_rpc_error(failed(grpc.StatusCode.UNAVAILABLE, None), "x"))


def info(domain: str) -> tuple[str, bytes]:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="THEIRS", domain=domain))
    return KEY, status_pb2.Status(code=5, message="theirs", details=[detail]).SerializeToString()


@pytest.mark.parametrize("trailing", [(), (info("example.org"),), ((KEY, b""),), (("other", "text"),)])
def test_a_refusal_that_is_not_this_packages_keeps_its_code_and_text(trailing: tuple[tuple[str, Any], ...]) -> None:
    got = from_rpc_error(failed(grpc.StatusCode.NOT_FOUND, "no such method", *trailing), "x")
    assert isinstance(got, Refused)
    assert (got.code, got.reason, got.message) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such method")


def test_both_kinds_are_the_packages_own() -> None:
    for kind in (Refused, Unreachable):
        assert issubclass(kind, HotweightsError)
