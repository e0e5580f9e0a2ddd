"""`token`, and a coordinator that is served with tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode, insecure_channel

from hotweights.cli.main import main
from hotweights.coordinator.access.roles import Role
from hotweights.coordinator.access.tokens import digest_of, parse_tokens, read_tokens
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import fleet_pb2

from .processes import DEADLINE_S, Node, Serving, one_line, start_coordinator, stop


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_a_line_for_the_tokens_file_is_printed(capsys: pytest.CaptureFixture[str], role: str) -> None:
    assert main(["token", role, "some-name"]) == 0
    line = capsys.readouterr().out
    (caller,) = parse_tokens(Path("t"), line.encode())
    assert (caller.role.value, caller.name) == (role, "some-name")
    assert caller.digest == digest_of(line.split()[2])


def test_with_out_the_token_goes_to_its_holder_and_the_line_has_only_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["token", "worker", "gpu-1", "--out", str(out)]) == 0
    line = capsys.readouterr().out
    token = out.read_text().strip()
    assert token not in line
    (caller,) = parse_tokens(Path("t"), line.encode())
    assert caller.digest == digest_of(token)
    assert out.stat().st_mode & 0o777 == 0o600
    assert main(["token", "worker", "gpu-1", "--out", str(out)]) == 1
    assert "is there already" in one_line(capsys.readouterr().err)
    assert out.read_text().strip() == token


def test_a_name_that_the_file_could_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("two words", "", "é", "#"):
        assert main(["token", "worker", name]) == 2
        assert "is no name" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("fault", ["readable", "missing", "bad line"])
def test_a_tokens_file_that_cannot_be_used_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    path = tmp_path / "tokens"
    if fault != "missing":
        path.write_text("janitor joe 0123456789012345678901234567\n")
        path.chmod(0o644 if fault == "readable" else 0o600)
    assert main(["coord-serve", "--endpoint", "tcp://127.0.0.1:0", "--store", "memory:", "--tokens", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith(f"tokens file {path}")
    assert {"readable": "chmod 600", "missing": "No such file", "bad line": "line 1"}[fault] in line


@pytest.fixture(scope="module")
def guarded(node: Node) -> Iterator[Serving]:
    """A coordinator with one viewer, whose token is in `viewer` of its folder."""
    line = node.run("token", "viewer", "vera", "--out", str(node.folder / "viewer")).stdout
    path = node.folder / "tokens"
    path.touch(0o600)
    path.write_text(line)
    assert len(read_tokens(path)) == 1
    serving = start_coordinator(node, "--store", "memory:", "--tokens", str(path))
    yield serving
    assert stop(serving.process) == 0, serving.log()


def test_without_a_token_a_command_is_refused_in_one_line_and_health_is_open(guarded: Serving) -> None:
    assert "wants a token" in guarded.refusal("coord-status")
    assert guarded.text("coord-health") == f"coordinator {guarded.endpoint}: serving\n"


def test_the_event_of_a_refusal_says_who_and_what_in_one_line(guarded: Serving) -> None:
    token = (guarded.node.folder / "viewer").read_text().strip()
    metadata = (("authorization", f"Bearer {token}"),)
    with insecure_channel(guarded.endpoint.removeprefix("tcp://")) as channel:
        stub = rpc.CoordinatorServiceStub(channel)
        with pytest.raises(Exception, match="takes a token of role operator") as caught:
            stub.RollBack(pb.RollBackRequest(), metadata=metadata, timeout=DEADLINE_S)
        assert caught.value.code() is StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
        status = stub.GetStatus(pb.GetStatusRequest(event_count=100), metadata=metadata, timeout=DEADLINE_S)
    refusals = [event for event in status.events if event.kind == fleet_pb2.EVENT_KIND_CALL_REFUSED]
    assert any(event.message.startswith("127.0.0.1 (viewer vera): /hotweights.v1.") for event in refusals)
    assert token not in guarded.log()


def test_tokens_on_a_network_without_encryption_are_warned_of(node: Node) -> None:
    path = node.folder / "more-tokens"
    path.touch(0o600)
    path.write_text(node.run("token", "viewer", "v").stdout)
    with (node.folder / "more.log").open("w"):
        serving = start_coordinator(
            node, "--store", "memory:", "--endpoint", "tcp://0.0.0.0:0", "--insecure", "--tokens", str(path)
        )
    try:
        assert "tokens travel in plaintext" in serving.log()
    finally:
        assert stop(serving.process) == 0
