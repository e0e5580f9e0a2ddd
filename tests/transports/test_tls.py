"""The tcp transport over TLS: who is let in, who is believed, and what either hears otherwise."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.certificates import Authority, contexts
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, pattern, serving

from hotweights.transports.address import parse_address
from hotweights.transports.errors import DeadlinePassed, PeerGone, TlsFailed
from hotweights.transports.line import Tls
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import Limits

CONTENT = pattern(MIB)


class Place:
    """An authority, another one, and what both sides have of them."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.others = Authority(folder), Authority(folder, "other")
        self.source, self.reader = self.ours.issue("source"), self.ours.issue("reader")
        self.elsewhere = self.ours.issue("elsewhere", "elsewhere.example")
        self.expired = self.ours.issue("expired", ends=2001)
        self.stranger = self.others.issue("stranger")
        self.good = contexts(self.source, self.reader, trusts=self.ours.file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("certificates"))


async def read(address: str, tls: Tls | None, size: int = 99) -> bytes:
    connection = await TcpTransport(tls=tls).connect(address, token=TOKEN, deadline_s=5)
    into = bytearray(size)
    try:
        await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=10)
    finally:
        await connection.close()
    return bytes(into)


async def test_nothing_of_the_bytes_or_the_token_is_seen_on_the_wire(place: Place) -> None:
    seen = bytearray()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1 << 16):
            seen.extend(part)
            writer.write(part)
        writer.close()

    async with serving(TcpTransport(tls=place.good), Held(CONTENT)) as server:

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection(*parse_address(server.address))
            await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

        relay = await asyncio.start_server(between, "127.0.0.1", 0)
        address = f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        assert await read(address, place.good, len(CONTENT)) == CONTENT
        relay.close()
        await relay.wait_closed()
    assert len(seen) > len(CONTENT)
    assert TOKEN not in seen
    assert CONTENT[:64] not in seen


Make = Callable[[Place], Tls]
REFUSALS: dict[str, tuple[Make, Make, str]] = {
    "a reader without a certificate": (
        lambda place: place.good,
        lambda place: contexts(None, None, trusts=place.ours.file),
        "refuses TLS with this side: certificate required",
    ),
    "a reader of another authority": (
        lambda place: place.good,
        lambda place: contexts(None, place.stranger, trusts=place.ours.file),
        "refuses TLS with this side: unknown ca",
    ),
    "a reader whose certificate is over": (
        lambda place: place.good,
        lambda place: contexts(None, place.expired, trusts=place.ours.file),
        "refuses TLS with this side: certificate expired",
    ),
    "a source of another authority": (
        lambda place: contexts(place.stranger, None, trusts=place.ours.file),
        lambda place: place.good,
        "shows a certificate that is not accepted: ",
    ),
    "a source of another name": (
        lambda place: contexts(place.elsewhere, None, trusts=place.ours.file),
        lambda place: place.good,
        "certificate is not valid for '127.0.0.1'",
    ),
    "a source whose certificate is over": (
        lambda place: contexts(place.expired, None, trusts=place.ours.file),
        lambda place: place.good,
        "certificate has expired",
    ),
}


@pytest.mark.parametrize("who", REFUSALS)
async def test_who_shows_what_is_not_accepted_gets_nothing_and_hears_why(who: str, place: Place) -> None:
    serves, reads, said = REFUSALS[who]
    source = Held(CONTENT)
    async with serving(TcpTransport(tls=serves(place)), source) as server:
        with pytest.raises(TlsFailed, match=said) as caught:
            await read(server.address, reads(place))
        assert caught.value.address == server.address
        assert not source.opened.is_set()


@pytest.mark.parametrize(
    ("is_served", "reader_said", "log_said"),
    [(True, "speaks TLS only", "speaks no TLS"), (False, "speaks no TLS", "speaks TLS, and this side does not")],
)
async def test_plaintext_and_tls_do_not_meet_and_both_sides_say_so(
    place: Place, caplog: pytest.LogCaptureFixture, is_served: bool, reader_said: str, log_said: str
) -> None:
    async with serving(TcpTransport(tls=place.good if is_served else None), Held(CONTENT)) as server:
        with caplog.at_level(logging.INFO, "hotweights"), pytest.raises(TlsFailed, match=reader_said):
            await read(server.address, None if is_served else place.good)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert log_said in caplog.text


@pytest.mark.parametrize("answer", [b"", b"220 mail.example.org ESMTP\r\n", b"\x15\x03\x03\x00\x02\x02\x28"])
async def test_a_port_that_is_no_source_fails_the_handshake(place: Place, answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    stranger = await asyncio.start_server(speak, "127.0.0.1", 0)
    with pytest.raises(TlsFailed):
        await read(f"127.0.0.1:{stranger.sockets[0].getsockname()[1]}", place.good)
    stranger.close()
    await stranger.wait_closed()


async def test_a_handshake_that_is_not_answered_ends_at_the_deadline(place: Place) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{mute.sockets[0].getsockname()[1]}"
    with pytest.raises(DeadlinePassed, match="connecting"):
        await TcpTransport(tls=place.good).connect(address, token=TOKEN, deadline_s=0.2)
    mute.close()
    await mute.wait_closed()


async def test_who_never_begins_the_handshake_is_left_behind(place: Place) -> None:
    async with serving(TcpTransport(Limits(hello_s=0.2), place.good), Held(CONTENT)) as server:
        stream, writer = await asyncio.open_connection(*parse_address(server.address))
        assert await asyncio.wait_for(stream.read(), 5) == b""
        writer.close()
        assert await read(server.address, place.good) == CONTENT[:99]


async def test_a_connection_cut_in_the_middle_is_gone_and_not_taken_for_the_end(place: Place) -> None:
    whole = pattern(64 * MIB)
    async with serving(TcpTransport(tls=place.good), Held(whole)) as server:

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_there = await asyncio.open_connection(*parse_address(server.address))

            async def up() -> None:
                while part := await reader.read(1 << 16):
                    to_there.write(part)

            rising = asyncio.create_task(up())
            writer.write(await there.read(1 << 10))
            for _ in range(64):
                writer.write(await there.read(1 << 14))
            await writer.drain()
            rising.cancel()
            writer.close()
            to_there.close()

        relay = await asyncio.start_server(between, "127.0.0.1", 0)
        with pytest.raises(PeerGone, match=r"in the middle of a transfer|fails at TLS|reset"):
            await read(f"127.0.0.1:{relay.sockets[0].getsockname()[1]}", place.good, len(whole))
        relay.close()
        await relay.wait_closed()


async def test_new_connections_take_the_contexts_that_there_are_now(place: Place) -> None:
    serves, reads = place.good.server(), place.good.client()
    changing = Tls(lambda: serves, lambda: reads)
    async with serving(TcpTransport(tls=changing), Held(CONTENT)) as server:
        before = await TcpTransport(tls=changing).connect(server.address, token=TOKEN, deadline_s=5)
        serves = contexts(place.expired, None, trusts=place.ours.file).server()
        with pytest.raises(TlsFailed, match="certificate has expired"):
            await read(server.address, changing)
        into = bytearray(9)
        await before.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        assert into == CONTENT[:9]
        await before.close()
        serves = place.good.server()
        assert await read(server.address, changing) == CONTENT[:99]
