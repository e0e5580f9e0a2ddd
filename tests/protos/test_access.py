"""What a client shows, to whom, and that it says nothing of a secret."""

from pathlib import Path

import pytest
from tests.certificates import Authority

from hotweights.wire.access import ANONYMOUS, Access, BadAccess, bearer, bearer_of
from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.problems import connecting

TLS, PLAIN, LOOPBACK = (parse_endpoint(text) for text in ("grpcs://h:1", "tcp://h:1", "tcp://127.0.0.1:1"))
SECRET = "hw-secret-word"


def test_nothing_is_shown_where_nothing_is_set() -> None:
    for endpoint in (TLS, PLAIN, LOOPBACK):
        assert ANONYMOUS.read(endpoint).metadata == ()


@pytest.mark.parametrize("endpoint", [TLS, LOOPBACK, parse_endpoint("unix:/x")])
def test_a_token_goes_where_nobody_listens_in(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    for access in (Access(token=SECRET), Access(token_file=file), Access(token_file=file, token="not this one")):
        assert access.read(endpoint).metadata == (("authorization", f"Bearer {SECRET}"),)


def test_a_token_does_not_go_in_plaintext_to_another_machine_unless_told() -> None:
    with pytest.raises(BadAccess, match=r"not sent in plaintext to tcp://h:1: write grpcs://h:1") as caught:
        Access(token=SECRET).read(PLAIN)
    assert SECRET not in str(caught.value)
    assert Access(token=SECRET, insecure_token=True).read(PLAIN).token == SECRET


def test_no_text_of_it_shows_a_secret(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("me")
    access = Access(files.ca, files.cert, files.key, token=SECRET)
    for text in (repr(access), repr(access.read(TLS)), str(access.read(TLS))):
        assert SECRET not in text
        assert "PRIVATE KEY" not in text


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe", "tok\u00e9n".encode(), b"x" * 5000])
def test_a_file_that_holds_no_token_is_refused_without_its_content(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(BadAccess, match=str(file)) as caught:
        Access(token_file=file).read(TLS)
    assert "words" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("me")
    over = Authority(tmp_path, "other").issue("over", ends=2001)
    for access, said in (
        (Access(ca=tmp_path / "none"), "none cannot be read"),
        (Access(ca=files.cert), "none of an authority"),
        (Access(cert=files.cert, key=over.key), "the key is not that of the certificate"),
        (Access(cert=over.cert, key=over.key), "over.pem: certificate has expired"),
        (Access(token_file=tmp_path), "cannot be read"),
    ):
        with pytest.raises(BadAccess, match=said):
            access.read(TLS)


def test_what_the_files_hold_is_read_at_every_channel(tmp_path: Path) -> None:
    file = tmp_path / "token"
    access = Access(token_file=file)
    for word in ("first", "second"):
        file.write_text(word)
        assert access.read(TLS).token == word


def test_a_token_is_found_in_the_metadata_that_showed_it() -> None:
    assert bearer_of(bearer(SECRET)) == SECRET
    assert bearer_of((("user-agent", "x"), ("authorization", "Basic eA=="))) == ""


@pytest.mark.parametrize(
    ("details", "endpoint", "said"),
    [
        ("errors resolving h:1: [field:hostname lookup error:...]", TLS, "the name h has no address here"),
        ("failed to connect to all addresses; last error: X: ipv4:1.2.3.4:1: timed out", TLS, "timed out"),
        ("failed to connect to all addresses; last error: X: recvmsg:Connection reset by peer", PLAIN, "grpcs://h:1"),
    ],
)
def test_what_grpc_says_becomes_one_line(details: str, endpoint: Endpoint, said: str) -> None:
    """The rest is tried against real servers, in tests/coordinator/test_tls.py."""
    text = connecting(details, endpoint, ANONYMOUS)
    assert said in text
    assert "last error" not in text
