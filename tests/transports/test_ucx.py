"""What is of ucx alone: who has it, what UCX is handed, and sources in other processes that die or hang."""

import asyncio
import importlib.util
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, pattern, serving

from hotweights.transports import frames
from hotweights.transports.base import Connection
from hotweights.transports.errors import DeadlinePassed, PeerGone, TokenRefused, TransportMissing
from hotweights.transports.line import PlainLine
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import Limits
from hotweights.transports.ucx import AHEAD, UcxConnection, UcxTransport
from hotweights.transports.ucx_lane import MODULES, Lane, open_lane

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(
        importlib.util.find_spec("ucxx") is None,
        reason="ucxx is not installed: it has wheels for Linux and Python 3.11 only",
    ),
]
CONTENT = pattern(9 * MIB + 5)


def ucx(*, fall_back: bool = False) -> UcxTransport:
    return UcxTransport(open_lane({"TLS": "tcp,sm,self"}), fall_back=fall_back)


async def read(connection: Connection, size: int = len(CONTENT)) -> bytes:
    into = bytearray(size)
    assert await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=10) == size
    return bytes(into)


@contextmanager
def a_source(mib: int, bytes_s: float = 1e12, tls: str = "tcp") -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [sys.executable, "-m", "tests.transports.ucx_source", str(mib), str(bytes_s), tls]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


async def until(holds: Callable[[], object]) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("tls", ["tcp", "tcp,sm"])
async def test_an_image_comes_from_another_process_over_tcp_and_over_shared_memory(tls: str) -> None:
    with a_source(40, tls=tls) as (_, address):
        connection = await ucx().connect(address, token=TOKEN, deadline_s=10)
        assert connection.way == "ucx"
        for _ in range(3):
            assert await read(connection, 40 * MIB) == pattern(40 * MIB)
        await connection.close()


async def test_readers_without_ucx_are_served_over_tcp_at_the_same_address() -> None:
    async with serving(ucx(), Held(CONTENT)) as server:
        connection = await TcpTransport(why="the test says so").connect(server.address, token=TOKEN, deadline_s=5)
        assert connection.way == "tcp (the test says so)"
        assert await read(connection) == CONTENT
        await connection.close()


async def test_a_source_without_ucx_is_read_over_tcp_or_not_at_all_as_it_was_asked_for() -> None:
    async with serving(TcpTransport(), Held(CONTENT)) as server:
        with pytest.raises(PeerGone, match="has no UCX, and HOTWEIGHTS_TRANSPORT is ucx"):
            await ucx().connect(server.address, token=TOKEN, deadline_s=5)
        connection = await ucx(fall_back=True).connect(server.address, token=TOKEN, deadline_s=5)
        assert connection.way == "tcp (the source has no UCX)"
        assert await read(connection) == CONTENT
        await connection.close()


class Watched(Lane):
    """Counts what it is handed."""

    def __init__(self) -> None:
        self._lane = open_lane({})
        self.address, self.handed = self._lane.address, list[bytes]()

    async def endpoint(self, address: bytes):  # type: ignore[no-untyped-def]
        self.handed.append(address)
        return await self._lane.endpoint(address)


async def test_ucx_is_handed_nothing_from_who_shows_no_good_token() -> None:
    lane = Watched()
    async with serving(UcxTransport(lane), Held(CONTENT)) as server:
        connection = await ucx().connect(server.address, token=b"another token", deadline_s=5)
        with pytest.raises(TokenRefused):
            await read(connection)
        assert not lane.handed
        good = await ucx().connect(server.address, token=TOKEN, deadline_s=5)
        assert await read(good) == CONTENT
        assert lane.handed == [open_lane({}).address]
        await good.close()


async def raw(address: str, *said: bytes) -> tuple[frames.Kind, bytes]:
    """The last answer to what is said after the hello; the connection's end is (REFUSED, b"")."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.setblocking(False)
        line = PlainLine(sock)
        answer = frames.Kind.REFUSED, b""
        await line.send(frames.hello(TOKEN))
        await frames.receive_frame(line)
        for part in said:
            await line.send(part)
            try:
                answer = await asyncio.wait_for(frames.receive_frame(line), 5)
            except (frames.Ended, OSError):
                return frames.Kind.REFUSED, b""
        return answer


@pytest.mark.parametrize(
    "said",
    [
        [frames.read_tagged(IMAGE, 0, 0, 100, None, 7)],  # has not joined
        [frames.join(IMAGE, b"", TOKEN)],  # no address
        [frames.frame(frames.Kind.JOIN, IMAGE)],
        # UCX would end the process on these.
        [frames.join(IMAGE, bytes(81), b"another token")],
        [frames.frame(frames.Kind.JOIN, IMAGE + b"no address of UCX at all" * 20)],
    ],
)
async def test_nonsense_ends_its_connection_and_no_other(said: list[bytes]) -> None:
    async with serving(ucx(), Held(CONTENT)) as server:
        connection = await ucx().connect(server.address, token=TOKEN, deadline_s=5)
        assert await raw(server.address, *said) == (frames.Kind.REFUSED, b"")
        assert await read(connection) == CONTENT
        await connection.close()


async def test_who_joins_twice_or_where_there_is_no_ucx_is_cut_off() -> None:
    address = open_lane({}).address
    async with serving(ucx(), Held(CONTENT)) as server:
        assert (await raw(server.address, frames.join(IMAGE, address, TOKEN)))[0] is frames.Kind.JOINED
        assert await raw(server.address, *[frames.join(IMAGE, address, TOKEN)] * 2) == (frames.Kind.REFUSED, b"")
    async with serving(TcpTransport(), Held(CONTENT)) as server:
        assert await raw(server.address, frames.join(IMAGE, address, TOKEN)) == (frames.Kind.REFUSED, b"")


class Unreached(Lane):
    """As where two nodes have no fabric in common."""

    def __init__(self) -> None:
        self.address = open_lane({}).address

    async def endpoint(self, address: bytes):  # type: ignore[no-untyped-def]
        raise OSError("UCX: Destination is unreachable")


@pytest.mark.parametrize("side", ["reader", "source"])
async def test_where_ucx_does_not_come_through_the_next_connection_is_tcp(side: str) -> None:
    source = UcxTransport(Unreached()) if side == "source" else ucx()
    lane = Unreached() if side == "reader" else open_lane({})
    reader = UcxTransport(lane, fall_back=True)
    async with serving(source, Held(CONTENT)) as server:
        first = await reader.connect(server.address, token=TOKEN, deadline_s=5)
        with pytest.raises(PeerGone):
            await read(first)
        second = await reader.connect(server.address, token=TOKEN, deadline_s=5)
        assert second.way == "tcp (UCX did not come through to the source)"
        assert await read(second) == CONTENT
        await second.close()


async def test_who_waits_over_ucx_leaves_the_processor_alone() -> None:
    with a_source(8, 1e6) as (_, address):
        connection = await ucx().connect(address, token=TOKEN, deadline_s=10)
        into = bytearray(8 * MIB)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=30))
        await until(lambda: into[0])
        before = time.process_time()
        await asyncio.sleep(2)
        assert time.process_time() - before < 1, "a loop that asks again and again takes all of it"
        await connection.close()
        with pytest.raises(PeerGone):
            await reading


async def test_a_source_that_is_killed_in_the_middle_is_gone_at_once() -> None:
    with a_source(64, 20e6) as (process, address):
        connection = await ucx().connect(address, token=TOKEN, deadline_s=10)
        into = bytearray(64 * MIB)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=30))
        await until(lambda: into[0])
        process.kill()
        begun = time.monotonic()
        with pytest.raises(PeerGone):
            await reading
        assert time.monotonic() - begun < 10
        assert not any(into[-8:]), "it came whole: the test did not cut it"


async def test_a_source_that_hangs_and_goes_on_after_the_deadline_writes_to_no_memory_of_ours() -> None:
    with a_source(64, 20e6) as (process, address):
        connection = await ucx().connect(address, token=TOKEN, deadline_s=10)
        into = bytearray(64 * MIB)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=2))
        await until(lambda: into[0])
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlinePassed):
            await reading
        into[:] = bytes(len(into))
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(1)
        assert not any(into)
        with pytest.raises(PeerGone):
            await read(connection, 1)
        again = await ucx().connect(address, token=TOKEN, deadline_s=10)
        assert await read(again, MIB) == pattern(MIB)
        await again.close()


async def test_a_reader_that_hangs_is_left_after_the_sources_patience() -> None:
    """It joins, asks, and takes nothing: the source does not wait for it for ever, nor does closing the source."""
    transport = UcxTransport(open_lane({}), Limits(stall_s=0.5))
    async with serving(transport, Held(CONTENT)) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            sock.setblocking(False)
            line = PlainLine(sock)
            for part in (frames.hello(TOKEN), frames.join(IMAGE, open_lane({}).address, TOKEN)):
                await line.send(part)
                await frames.receive_frame(line)
            await line.send(frames.read_tagged(IMAGE, 0, 0, len(CONTENT), None, 12345))
            assert (await frames.receive_frame(line))[0] is frames.Kind.DATA_TAGGED
            with pytest.raises((frames.Ended, OSError)):
                await asyncio.wait_for(frames.receive_frame(line), 10)
        connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        assert await read(connection) == CONTENT
        await connection.close()


async def test_a_limit_of_bandwidth_holds_over_ucx() -> None:
    with a_source(8, 8 * MIB) as (_, address):
        connection = await ucx().connect(address, token=TOKEN, deadline_s=10)
        begun = time.monotonic()
        assert await read(connection, 4 * MIB) == pattern(4 * MIB)
        assert time.monotonic() - begun > 0.3
        await connection.close()


async def test_a_connection_keeps_memory_for_a_few_pieces_only() -> None:
    async with serving(ucx(), Held(pattern(64 * MIB))) as server:
        connection = await ucx().connect(server.address, token=TOKEN, deadline_s=5)
        assert isinstance(connection, UcxConnection)
        await read(connection, 64 * MIB)
        assert sum(len(room) for room in connection._memory) <= AHEAD * frames.PIECE_BYTES_MAX
        await connection.close()


async def test_without_either_library_it_is_missing_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotweights.transports import ucx_lane

    monkeypatch.setattr(ucx_lane, "_lane", None)
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TransportMissing, match=r"ucx.* needs ucxx.*install hotweights\[ucx\]"):
        open_lane({})
