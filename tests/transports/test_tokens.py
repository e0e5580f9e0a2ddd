"""Transfer tokens: one opens exactly what it was made for, until it expires."""

import os
import subprocess
import sys

import pytest

from hotweights.transports import base
from hotweights.wire import tokens
from hotweights.wire.tokens import TOKEN_BYTES_MAX, BadToken, check_token, make_token

KEY = bytes(range(32))
IMAGE = bytes(range(32, 64))
TOKEN = make_token(KEY, IMAGE, "reader-1", "source-1", 1000)


def test_a_good_token_tells_who_reads() -> None:
    assert check_token(KEY, TOKEN, IMAGE, "source-1", 999.9) == "reader-1"
    name = "node ünïcode " * 10
    assert check_token(KEY, make_token(KEY, IMAGE, name, "s", 2.5), IMAGE, "s", 1) == name


@pytest.mark.parametrize("now_s", [1000, 1000.5, 1e9])
def test_a_token_is_over_at_its_expiry(now_s: float) -> None:
    with pytest.raises(BadToken) as caught:
        check_token(KEY, TOKEN, IMAGE, "source-1", now_s)
    assert caught.value.expired


def test_a_token_opens_no_other_image_source_or_key() -> None:
    for key, image, source in (
        (os.urandom(32), IMAGE, "source-1"),
        (KEY, os.urandom(32), "source-1"),
        (KEY, IMAGE, "source-2"),
        (KEY, IMAGE, ""),
        (KEY, b"", "source-1"),
    ):
        with pytest.raises(BadToken) as caught:
            check_token(key, TOKEN, image, source, 1)
        assert not caught.value.expired


def test_no_bit_of_a_token_can_be_changed_and_none_of_its_bytes_left_out() -> None:
    for bit in range(len(TOKEN) * 8):
        forged = bytearray(TOKEN)
        forged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadToken):
            check_token(KEY, bytes(forged), IMAGE, "source-1", 1)
    for length in range(len(TOKEN)):
        with pytest.raises(BadToken):
            check_token(KEY, TOKEN[:length], IMAGE, "source-1", 1)
    with pytest.raises(BadToken):
        check_token(KEY, TOKEN + b"\0", IMAGE, "source-1", 1)
    with pytest.raises(BadToken, match="malformed"):
        check_token(KEY, bytes(TOKEN_BYTES_MAX + 1), IMAGE, "source-1", 1)


def test_bytes_cannot_be_moved_between_the_source_and_what_stands_before_it() -> None:
    """Only fixed lengths stand between them; a token for source `ab` must not do for `b`."""
    token = make_token(KEY, IMAGE, "r", "ab", 10)
    for source in ("b", "a", "abc"):
        with pytest.raises(BadToken):
            check_token(KEY, token, IMAGE, source, 1)


def test_impossible_arguments_are_the_callers_mistake() -> None:
    for key, image, reader in ((b"short", IMAGE, "r"), (KEY, b"short", "r"), (KEY, IMAGE, ""), (KEY, IMAGE, "r" * 500)):
        with pytest.raises(ValueError, match="bytes"):
            make_token(key, image, reader, "s", 1)


@pytest.mark.parametrize("name", [b"", b"\x84"])
def test_a_sealed_token_that_names_no_reader_is_refused_all_the_same(name: bytes) -> None:
    """Nobody makes one; a check must not fail in another way for it."""
    head = tokens._HEAD.pack(1, 10, len(name)) + name
    with pytest.raises(BadToken):
        check_token(KEY, head + tokens._mac(KEY, head, IMAGE, "s"), IMAGE, "s", 1)


def test_every_token_fits_a_transport() -> None:
    longest = make_token(KEY, IMAGE, "r" * tokens._READER_BYTES_MAX, "s", 1)
    assert len(longest) == TOKEN_BYTES_MAX == base.TOKEN_BYTES_MAX
    base.check_token(longest)
    assert check_token(KEY, longest, IMAGE, "s", 0).startswith("rrr")


def test_tokens_are_made_without_loading_grpc() -> None:
    code = "import sys, hotweights.wire.tokens; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
