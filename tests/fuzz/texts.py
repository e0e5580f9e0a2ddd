"""What people and files write: endpoints, addresses, settings, the tokens file; and transfer tokens."""

import hmac
from contextlib import suppress
from pathlib import Path

from tests.fuzz.kinds import Cursor, Target, parts

from hotweights.coordinator.access.tokens import BadTokens, parse_tokens
from hotweights.transports.address import format_address, parse_address
from hotweights.wire.endpoint import BadEndpoint, parse_endpoint
from hotweights.wire.tokens import BadToken, check_token, make_token
from hotweights.worker_client.config import BadSetting, load_config

KEY, IMAGE, SOURCE = b"k" * 32, b"i" * 32, "source"
NUMBERS = ("HOTWEIGHTS_BUCKET_BYTES", "HOTWEIGHTS_MAX_IMAGES", "HOTWEIGHTS_AGENT_IDLE_S")
WORDS = ("HOTWEIGHTS_NAME_MAP", "HOTWEIGHTS_POLICY", "HOTWEIGHTS_ROUTE", "HOTWEIGHTS_AGENT_ALLOW")


def endpoints(data: bytes) -> None:
    """What is read is written so that it is read back the same."""
    text = data.decode("utf-8", "surrogateescape")
    with suppress(BadEndpoint):
        endpoint = parse_endpoint(text)
        assert parse_endpoint(str(endpoint)) == endpoint
        assert endpoint.path or 0 <= endpoint.port < 65536
        assert endpoint.is_loopback in (True, False)
    address: tuple[str, int] | None = None
    with suppress(ValueError):
        address = parse_address(text)
    if address is not None:
        assert parse_address(format_address(*address)) == address


def settings(data: bytes) -> None:
    """One setting of the worker side, any text."""
    cursor = Cursor(data)
    name = (*NUMBERS, *WORDS, "HOTWEIGHTS_ENDPOINT")[cursor.number(8)]
    text = cursor.part().decode("utf-8", "surrogateescape")
    with suppress(BadSetting, BadEndpoint):
        config = load_config({name: text})
        assert config.bucket_bytes is None or config.bucket_bytes >= 64 << 10
        assert 1 <= config.max_images <= 1000
        assert 0 <= config.agent_idle_s < float("inf")
        assert all(old and new for old, new in config.name_map.items())


def tokens_file(data: bytes) -> None:
    """What is accepted has a role, a plain name and a digest; no error repeats a long word of the file."""
    try:
        callers = parse_tokens(Path("tokens"), data)
    except BadTokens as error:
        said = str(error)
        assert "\n" not in said
        assert not any(len(word) >= 20 and word.decode("latin-1") in said for word in data.split())
        return
    assert callers
    for caller in callers:
        assert len(caller.digest) == 32
        assert caller.name.isascii()
        assert caller.name.isprintable()
        assert " " not in caller.name


def transfer_tokens(data: bytes) -> None:
    """As it is, and with a seal that is good over any head: what lies behind the seal is looked at too."""
    sealed = data + hmac.digest(KEY, data + IMAGE + SOURCE.encode(), "sha256")
    for token in (data, sealed):
        with suppress(BadToken):
            reader = check_token(KEY, token, IMAGE, SOURCE, now_s=1000.0)
            assert reader
            assert token is sealed or token in _genuine(), "nobody else can make one"


def _token(reader: str, expires_at_s: float) -> bytes:
    return make_token(KEY, IMAGE, reader, SOURCE, expires_at_s)


def _genuine() -> list[bytes]:
    return [_token("reader", 2000.0), _token("r" * 400, 1.0)]


TARGETS = {
    "endpoints": Target(
        endpoints,
        lambda: [
            *(b"tcp://127.0.0.1:5555", b"grpc://host.example:1/", b"[::1]:80", b"unix:///run/a.sock", b"unix:here"),
            *(b"tcp://h:" + b"9" * 5000, b"localhost:65536", b"[fe80::1%eth0]:1"),
        ],
        length_max=6000,
    ),
    "settings": Target(
        settings,
        lambda: [
            *(bytes([0]) + parts(b"1048576"), bytes([1]) + parts(b"9" * 5000), bytes([2]) + parts(b"12.5")),
            *(bytes([0]) + parts("²".encode()), bytes([3]) + parts(b"a.b=c.d, e=f"), bytes([4]) + parts(b"auto")),
            bytes([6]) + parts(b"1,@0,@root"),
            bytes([7]) + parts(b"tcp://h:1"),
        ],
        length_max=6000,
        mutations=1000,
    ),
    "tokens_file": Target(
        tokens_file,
        lambda: [
            b"# who\noperator alice hw_0123456789abcdef0123456789\nworker g sha256:" + b"0a" * 32 + b"\n",
            b"viewer v abcdefghijabcdefghij==\r\n\n\n#\nviewer w abcdefghijabcdefghik",
        ],
    ),
    "transfer_tokens": Target(
        transfer_tokens,
        lambda: [*_genuine(), _genuine()[0][:-32], b"", b"\1" * 43],
        length_max=600,
    ),
}
