"""The tokens file: what it may say, who may read it, and what happens when it changes."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from hotweights.coordinator.access.roles import Role
from hotweights.coordinator.access.tokens import (
    ENTRIES_MAX,
    FILE_BYTES_MAX,
    BadTokens,
    Tokens,
    hashed,
    new_token,
    parse_tokens,
    read_tokens,
)

HERE = Path("tokens")
A, B = new_token(), new_token()


def write(path: Path, *lines: str, mode: int = 0o600) -> Path:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return path


def test_a_file_has_tokens_and_hashes_of_tokens_and_comments(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "# who", "", f"operator alice {A}", f"  worker\tgpu-1   {hashed(B)} ", "#end")
    tokens = Tokens(path)
    for token, role, name in ((A, Role.OPERATOR, "alice"), (B, Role.WORKER, "gpu-1")):
        caller = tokens.find(token.encode())
        assert caller is not None
        assert (caller.role, caller.name) == (role, name)
    assert tokens.find(new_token().encode()) is None
    assert tokens.find(b"") is None
    assert tokens.find(hashed(B).encode()) is None, "a hash is no token"


def test_a_caller_shows_no_token_and_no_hash() -> None:
    (caller,) = parse_tokens(HERE, f"viewer v {A}".encode())
    assert A not in repr(caller)
    assert caller.digest.hex() not in repr(caller)
    assert repr(caller.digest) not in repr(caller)


def test_drawn_tokens_are_all_different_and_long() -> None:
    drawn = {new_token() for _ in range(100)}
    assert len(drawn) == 100
    assert min(map(len, drawn)) >= 43


BAD = {
    "no token": "has no token",
    "# only a comment": "has no token",
    f"viewer {A}": "line 1: has 2 words",
    f"viewer a {A} more": "line 1: has 4 words",
    f"admin a {A}": "line 1: its first word is no role; roles are viewer, worker, publisher, operator",
    f"VIEWER a {A}": "line 1: its first word is no role",
    f"viewer a/b {A}": "line 1: its second word is no name",
    f"viewer {'n' * 65} {A}": "line 1: its second word is no name",
    "viewer a short": "line 1: its token is not 20 to 512",
    f"viewer a {'x' * 513}": "line 1: its token is not 20 to 512",
    "viewer a " + 'quote"' * 5: "line 1: its token is not 20 to 512",
    "viewer a sha256:abc": "line 1: after sha256: come 64 hex digits",
    f"viewer a sha256:{'g' * 64}": "line 1: after sha256: come 64 hex digits",
    f"viewer a {A}\n\nworker a {B}": "line 3: its name stands in line 1 already",
    f"viewer a {A}\nworker b {A}": "line 2: its token stands in line 1 already",
    f"viewer a {A}\nworker b {hashed(A)}": "line 2: its token stands in line 1 already",
    f"viewer é {A}": "line 1: is not plain ASCII",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_refused_with_its_line_and_never_with_a_token(text: str) -> None:
    content = "" if text == "no token" else text
    with pytest.raises(BadTokens, match=BAD[text]) as caught:
        parse_tokens(HERE, content.encode())
    for token in (A, B, "short"):
        assert f" {token}" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_bounds_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(BadTokens, match="is larger than"):
        parse_tokens(HERE, b"#" * (FILE_BYTES_MAX + 1))
    lines = [f"viewer v{n} sha256:{n:064x}" for n in range(ENTRIES_MAX + 1)]
    assert len(parse_tokens(HERE, "\n".join(lines[:-1]).encode())) == ENTRIES_MAX
    with pytest.raises(BadTokens, match=f"line {ENTRIES_MAX + 1}: more than {ENTRIES_MAX} tokens"):
        parse_tokens(HERE, "\n".join(lines).encode())


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o777])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "t", f"viewer v {A}", mode=mode)
    with pytest.raises(BadTokens, match=f"mode {mode:04o}.: chmod 600 {path}"):
        read_tokens(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_file_of_the_owner_and_its_group_is_read(tmp_path: Path, mode: int) -> None:
    assert read_tokens(write(tmp_path / "t", f"viewer v {A}", mode=mode))


def test_a_file_that_is_not_there_or_no_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadTokens, match="cannot be read: No such file"):
        read_tokens(tmp_path / "none")
    with pytest.raises(BadTokens, match="is no plain file"):
        read_tokens(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(BadTokens, match="is no plain file"):
        read_tokens(tmp_path / "pipe")


def test_a_file_that_changed_is_read_again_and_one_that_did_not_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "t", f"viewer v {A}")
    tokens = Tokens(path)
    before = tokens.find(A.encode())
    assert before is not None
    assert not tokens.look()
    write(path, f"worker w {B}")
    assert tokens.look()
    assert tokens.find(A.encode()) is None
    assert not tokens.still(before)
    assert tokens.find(B.encode()) is not None
    assert not tokens.look()


@pytest.mark.parametrize("fault", ["bad line", "readable", "gone"])
def test_while_a_changed_file_is_bad_the_old_tokens_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path = write(tmp_path / "t", f"viewer v {A}")
    tokens = Tokens(path)
    if fault == "gone":
        path.unlink()
    elif fault == "readable":
        path.chmod(0o644)
    else:
        write(path, f"viewer v {A}", "janitor j x")
    with caplog.at_level(logging.ERROR):
        assert not tokens.look()
        assert not tokens.look()
    assert len(caplog.records) == 1, "said once, not at every look"
    assert "the tokens of before stay in force" in caplog.text
    if fault == "bad line":
        assert "line 2" in caplog.text
    assert tokens.find(A.encode()) is not None
    write(path, f"worker w {B}")
    assert tokens.look()
    assert tokens.find(B.encode()) is not None


def test_a_file_that_could_not_be_read_once_is_read_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t", f"viewer v {A}")
    tokens = Tokens(path)
    write(path, f"worker w {B}")

    def too_many(self: Path, mode: str) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", too_many)
        assert not tokens.look()
        assert not tokens.look()
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once, not at every look"
    assert "Too many open files" in caplog.text
    assert tokens.look()
    assert tokens.find(A.encode()) is None


def test_another_fault_of_the_file_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "t", f"viewer v {A}")
    tokens = Tokens(path)
    for content in ("janitor j x", f"viewer v {A} more"):
        write(path, content)
        assert not tokens.look()
    assert ["its first word is no role" in caplog.text, "has 4 words" in caplog.text] == [True, True]


def test_every_entry_is_compared_whatever_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t", f"viewer a {A}", f"viewer b {B}", f"viewer c {new_token()}")
    tokens = Tokens(path)
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("hotweights.coordinator.access.tokens.hmac.compare_digest", compare)
    assert tokens.find(A.encode()) is not None
    assert len(compared) == 3
