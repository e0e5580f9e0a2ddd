"""What only a real network can do to the tcp transport: nonsense, crowds, and processes that are killed."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, accept_good_token, pattern, serving

from hotweights.transports import frames
from hotweights.transports.address import format_address, parse_address
from hotweights.transports.base import Range
from hotweights.transports.errors import DeadlinePassed, PeerGone
from hotweights.transports.line import PlainLine
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import Limits, TcpServer

CONTENT = pattern(MIB)
GOOD_HELLO = frames.hello(TOKEN)

SERVE_FOREVER = """
import asyncio, sys
from hotweights.transports.tcp import TcpTransport

class Source:
    def at_hand(self, image, file, offset, size):
        return memoryview(bytes([1]) * size)

async def main():
    server = await TcpTransport().serve(Source(), check=lambda token, image: True)
    print(server.address, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_a_file_that_ends_before_the_range_ends_the_connection_and_nobody_elses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = tmp_path / "short"
    short.write_bytes(CONTENT[:1000])
    source = Held(CONTENT, path=short)
    async with serving(TcpTransport(), source) as server:
        with pytest.raises(PeerGone):
            await read(TcpTransport(), server.address, 2000)
        base = bytes(reversed(IMAGE))
        asking = await TcpTransport().connect(server.address, token=TOKEN, deadline_s=5)
        with pytest.raises(PeerGone):  # for a delta it is mapped
            await asking.read_into(IMAGE, 0, 0, memoryview(bytearray(2000)), deadline_s=5, base=base)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert await read(TcpTransport(), server.address, 1000) == CONTENT[:1000]


async def read(transport: TcpTransport, address: str, size: int = 99) -> bytes:
    connection = await transport.connect(address, token=TOKEN, deadline_s=5)
    into = bytearray(size)
    await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=10)
    await connection.close()
    return bytes(into)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(600),
        frames.frame(frames.Kind.READ, bytes(52)),
        b"\xff\xff\xff\xff\x01",
        frames.frame(frames.Kind.HELLO, b"HOTWTS99" + TOKEN),
        frames.hello(b"x" * 513),
        GOOD_HELLO + b"\x00\x00\x00\x00\x63",
        GOOD_HELLO + GOOD_HELLO,
        GOOD_HELLO + frames.read(IMAGE, 0, 0, 0),
        GOOD_HELLO + frames.read(IMAGE, 0, 0, 1 << 40),
    ],
    ids=[
        "http",
        "tls",
        "read first",
        "endless frame",
        "other version",
        "long token",
        "unknown kind",
        "hello twice",
        "empty read",
        "huge read",
    ],
)
async def test_garbage_closes_its_own_connection_with_one_line_in_the_log(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    transport = TcpTransport()
    async with serving(transport, Held(CONTENT)) as server:
        bystander = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        with caplog.at_level(logging.INFO, "hotweights"):
            stream, writer = await asyncio.open_connection(*parse_address(server.address))
            writer.write(garbage)
            await ended(stream)
            writer.close()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "closed the connection of 127.0.0.1" in caplog.text
        into = bytearray(9)
        await bystander.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        assert into == CONTENT[:9]
        await bystander.close()


async def test_a_connection_that_never_says_hello_is_closed() -> None:
    transport = TcpTransport(Limits(hello_s=0.2))
    async with serving(transport, Held(CONTENT)) as server:
        stream, writer = await asyncio.open_connection(*parse_address(server.address))
        await ended(stream)
        writer.close()
        assert await read(transport, server.address) == CONTENT[:99]


async def test_a_reader_that_takes_nothing_is_left_behind() -> None:
    transport = TcpTransport(Limits(stall_s=0.3))
    async with serving(transport, Held(pattern(64 * MIB))) as server:
        _, writer = await asyncio.open_connection(*parse_address(server.address), limit=1024)
        writer.write(GOOD_HELLO + frames.read(IMAGE, 0, 0, 64 * MIB))
        await asyncio.wait_for(until_count(server, 1), 10)
        await asyncio.wait_for(until_count(server, 0), 10)
        writer.close()


async def test_one_reader_too_many_is_turned_away_and_the_others_stay() -> None:
    transport = TcpTransport(Limits(connections_max=2))
    async with serving(transport, Held(CONTENT)) as server:
        inside = [await transport.connect(server.address, token=TOKEN, deadline_s=5) for _ in range(2)]
        late = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        into = bytearray(9)
        for connection in inside:
            await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        with pytest.raises(PeerGone, match="too many readers"):
            await late.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        with pytest.raises(PeerGone, match="its limit"):
            await transport.connect(server.address, token=TOKEN, deadline_s=5)
        await inside[1].read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        assert into == CONTENT[:9]
        await inside[0].close()
        await asyncio.wait_for(until_count(server, 1), 5)
        assert await read(transport, server.address) == CONTENT[:99]
        await inside[1].close()


STRANGERS: dict[str, bytes] = {"silent": b"", "no token": frames.hello(b"wrong"), "no read": GOOD_HELLO}


@pytest.mark.parametrize("who", STRANGERS)
async def test_strangers_as_many_as_come_turn_no_reader_away(who: str) -> None:
    limits = Limits(connections_max=3, strangers_max=8, strangers_of_one_host_max=4)
    transport = TcpTransport(limits, warn=lambda host, text: None)
    async with serving(transport, Held(CONTENT)) as server:
        reader = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        into = bytearray(9)
        await reader.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        writers = []
        for _ in range(5):
            here = [asyncio.open_connection(*parse_address(server.address)) for _ in range(8)]
            writers += await asyncio.gather(*here)
            for _, writer in writers[-8:]:
                writer.write(STRANGERS[who])
        assert await read(transport, server.address) == CONTENT[:99]
        await reader.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        assert into == CONTENT[:9]
        for stream, _ in writers[:-4]:
            await ended(stream)
        await asyncio.wait_for(until_count(server, 1 + 4 - 1), 5)  # the last read took the place of one of four
        for _, writer in writers:
            writer.close()
        await reader.close()


async def test_a_thousand_connections_that_say_nothing_keep_no_reader_out() -> None:
    limits = Limits()
    async with serving(TcpTransport(limits), Held(CONTENT)) as server:
        assert isinstance(server, TcpServer)
        reader = await TcpTransport().connect(server.address, token=TOKEN, deadline_s=5)
        host, port = server.address.split(":")
        with contextlib.ExitStack() as silent:
            for number in range(1000):
                silent.enter_context(socket.create_connection((host, int(port)), timeout=5))
                if number % 100 == 0:
                    into = bytearray(4096)
                    await reader.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
                    assert into == CONTENT[:4096]
                await asyncio.sleep(0)
            assert server.connection_count <= limits.strangers_max + 1
            late = await TcpTransport().connect(server.address, token=TOKEN, deadline_s=5)
            await late.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
            await late.close()
        await reader.close()


async def test_the_host_with_the_most_strangers_makes_room_for_others() -> None:
    limits = Limits(strangers_max=3, strangers_of_one_host_max=3)
    async with serving(TcpTransport(limits, warn=lambda host, text: None), Held(CONTENT)) as server:
        where = parse_address(server.address)

        async def come(host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection(*where, local_addr=(host, 0))

        first, *crowd = [await come(host) for host in ("127.0.0.2", "127.0.0.1", "127.0.0.1")]
        late = await come("127.0.0.3")
        await ended(crowd[0][0])
        for stream, writer in (first, crowd[1], late):
            assert not stream.at_eof()
            writer.close()
        crowd[0][1].close()


async def test_who_is_let_in_and_reads_nothing_is_left_behind() -> None:
    transport = TcpTransport(Limits(hello_s=0.2))
    async with serving(transport, Held(CONTENT)) as server:
        connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        await asyncio.wait_for(until_count(server, 0), 5)
        await connection.close()
        reader = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        into = bytearray(9)
        for _ in range(2):
            await reader.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
            await asyncio.sleep(0.4)  # a reader may take its time
        await reader.close()


@pytest.mark.parametrize("size", [1, len(CONTENT) + 1], ids=["served", "refused"])
async def test_a_reader_that_asks_without_end_leaves_the_loop_to_others(size: int) -> None:
    """What it asks for has come already, and its answers find room: nothing of it has to wait."""
    wishes, turns, seen, all_asked = 200, 0, list[int](), asyncio.Event()

    class Watched(Held):
        def at_hand(self, image: bytes, file: int, offset: int, size: int) -> Range | None:
            seen.append(turns)
            if len(seen) == wishes:
                all_asked.set()
            return super().at_hand(image, file, offset, size)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with serving(TcpTransport(), Watched(CONTENT, in_memory=True)) as server:
        _, writer = await asyncio.open_connection(*parse_address(server.address))
        writer.write(GOOD_HELLO + frames.read(IMAGE, 0, 0, size) * wishes)
        turning = asyncio.ensure_future(others())
        await asyncio.wait_for(all_asked.wait(), 10)
        turning.cancel()
        writer.close()
    assert seen == sorted(set(seen))


async def test_a_token_that_is_refused_ends_the_connection_at_the_source() -> None:
    transport = TcpTransport()
    async with serving(transport, Held(CONTENT)) as server:
        stream, writer = await asyncio.open_connection(*parse_address(server.address))
        writer.write(frames.hello(b"wrong") + frames.read(IMAGE, 0, 0, 9))
        await ended(stream)
        await asyncio.wait_for(until_count(server, 0), 5)
        writer.close()


async def test_a_source_process_killed_in_the_middle_of_a_bucket_is_gone() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVE_FOREVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    address = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()
    connection = await TcpTransport().connect(address, token=TOKEN, deadline_s=5)
    into = bytearray(512 * MIB)
    reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=30))
    while into[0] == 0 and not reading.done():  # noqa: ASYNC110  the transport sets no event
        await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(PeerGone):
        await reading
    assert into[0] == 1
    assert into[-1] == 0
    await process.wait()


@pytest.mark.parametrize("answer", [b"", b"220 mail.example.org ESMTP\r\n", frames.data(9) + bytes(9)])
async def test_a_port_that_is_not_ours_is_no_source(answer: bytes) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    stranger = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    with pytest.raises(PeerGone):
        await TcpTransport().connect(f"127.0.0.1:{port}", token=TOKEN, deadline_s=5)
    stranger.close()
    await stranger.wait_closed()


@pytest.mark.parametrize("size", [8, 10])
async def test_an_answer_of_another_size_is_not_taken_for_the_range(size: int) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(GOOD_HELLO))
        writer.write(frames.frame(frames.Kind.WELCOME) + frames.data(size) + bytes(size))
        await reader.read()
        writer.close()

    stranger = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    with pytest.raises(PeerGone, match="another number of bytes"):
        await read(TcpTransport(), f"127.0.0.1:{port}", size=9)
    stranger.close()
    await stranger.wait_closed()


async def test_a_connection_closed_when_all_bytes_have_just_come_leaves_no_socket_behind() -> None:
    go, sent = threading.Event(), threading.Event()

    def answer_one_read(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(len(GOOD_HELLO), socket.MSG_WAITALL)
            sock.sendall(frames.frame(frames.Kind.WELCOME))
            sock.recv(len(frames.read(IMAGE, 0, 0, 9)), socket.MSG_WAITALL)
            assert go.wait(5)
            sock.sendall(frames.data(9) + CONTENT[:9])
            sent.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        answering = threading.Thread(target=answer_one_read, args=(listener,))
        answering.start()
        connection = await TcpTransport().connect(
            format_address("127.0.0.1", listener.getsockname()[1]), token=TOKEN, deadline_s=5
        )
        into = bytearray(9)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5))
        await asyncio.sleep(0.05)
        # The event loop is held up until all is in the socket's buffer, then the connection is closed.
        go.set()
        assert sent.wait(5)
        await connection.close()
        await asyncio.wait([reading], timeout=5)
        assert reading.done()
        assert reading.exception() is None
        assert into == CONTENT[:9]
        assert isinstance(connection._line, PlainLine)
        assert connection._line.sock.fileno() == -1
        await asyncio.to_thread(answering.join, 5)


async def test_connecting_to_a_port_that_never_answers_ends_at_the_deadline() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    with pytest.raises(DeadlinePassed, match="connecting"):
        await TcpTransport().connect(f"127.0.0.1:{port}", token=TOKEN, deadline_s=0.2)
    mute.close()
    await mute.wait_closed()


async def test_a_blocked_source_does_not_hold_up_the_event_loop_or_other_readers() -> None:
    class Slow(Held):
        def open(self, image: bytes, file: int, offset: int, size: int) -> memoryview:
            if offset == 1:
                time.sleep(0.5)
            return memoryview(CONTENT)[offset : offset + size]

    transport = TcpTransport()
    server = await transport.serve(Slow(CONTENT), check=accept_good_token)
    connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
    slow = asyncio.create_task(connection.read_into(IMAGE, 0, 1, memoryview(bytearray(9)), deadline_s=10))
    await asyncio.sleep(0.05)
    assert await read(transport, server.address) == CONTENT[:99]
    assert not slow.done()
    await slow
    await connection.close()
    await server.close()


async def test_the_address_is_loopback_unless_one_is_advertised() -> None:
    transport = TcpTransport()
    server = await transport.serve(Held(CONTENT), check=accept_good_token)
    host, port = parse_address(server.address)
    assert host == "127.0.0.1"
    assert port > 0
    await server.close()

    with pytest.raises(ValueError, match="which one to advertise"):
        await transport.serve(Held(CONTENT), "0.0.0.0:0", check=accept_good_token)

    for told in ("localhost", "localhost:0"):
        server = await transport.serve(Held(CONTENT), "0.0.0.0:0", check=accept_good_token, advertise=told)
        assert parse_address(server.address)[0] == "localhost"
        assert await read(transport, server.address) == CONTENT[:99]
        await server.close()


# By fuzzing: int() raises for so many digits, and brackets were taken for a host.
FOUND = ("host:" + "9" * 5000, "[]:80", "[]]:80", "a b:80")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:70000", "::1:80", "[::1:80", "host:x", *FOUND])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_address(text)


def test_an_ipv6_address_goes_in_brackets() -> None:
    assert parse_address("tcp://[::1]:80") == ("::1", 80)
    assert format_address("::1", 80) == "[::1]:80"


async def ended(stream: asyncio.StreamReader) -> None:
    """The other side closed, or reset, the connection."""
    try:
        await asyncio.wait_for(stream.read(), 5)
    except ConnectionResetError:
        return


async def until_count(server: object, count: int) -> None:
    while server.connection_count != count:  # type: ignore[attr-defined]  # noqa: ASYNC110
        await asyncio.sleep(0.01)
