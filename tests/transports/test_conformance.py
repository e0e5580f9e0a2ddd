"""What base.py promises, of every transport."""

import asyncio
import hashlib
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.certificates import Authority, contexts
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, pattern, serving

from hotweights.transports import tcp
from hotweights.transports.base import Connection, Place, Reads, Server, ThreadConnection, TokenCheck, Transport
from hotweights.transports.errors import DeadlinePassed, NotHeld, NotYet, PeerGone, TokenRefused
from hotweights.transports.line import Tls
from hotweights.transports.memory import MemoryNetwork, MemoryTransport
from hotweights.transports.shared import SharedTransport
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import TcpServer
from hotweights.transports.threads import Spare, Stop
from hotweights.transports.ucx import UcxTransport
from hotweights.transports.ucx_lane import open_lane

OTHER_IMAGE = bytes(32)
CONTENT = pattern(3 * MIB + 5)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    return contexts(authority.issue("source"), authority.issue("reader"), trusts=authority.file)


# One loop for all: the libraries of UCX keep one worker a process, which stays with the loop that made it.
pytestmark = pytest.mark.asyncio(loop_scope="session")


class InPlace(SharedTransport):
    """Whatever a source holds whole lies in a folder that its readers see too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(TcpTransport(), [folder])
        self._folder = folder

    async def serve(self, source: Any, listen: str, *, check: TokenCheck, advertise: str | None = None) -> TcpServer:
        if type(source) is Held and source.there is None and source.gate is None:
            file = self._folder / "held"
            file.write_bytes(source.content)
            source.place = Place(str(file), len(source.content), file.stat().st_mtime_ns)
        return await super().serve(source, listen, check=check, advertise=advertise)


class InThreads(TcpTransport):
    """Every read in a thread."""

    async def connect(self, address: str, *, token: bytes, deadline_s: float) -> Any:
        return InThread(await super().connect(address, token=token, deadline_s=deadline_s))


class InThread:
    """A connection whose reads wait in a thread, as those of a fetch do."""

    way, origin = "tcp", ""

    def __init__(self, connection: ThreadConnection) -> None:
        self._connection = connection
        self.close = connection.close

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        came: list[int] = []

        def work(reads: Reads, _: Stop) -> None:
            reads.ask(image, file, offset, into.nbytes, base)
            came.append(reads.take(into, deadline_s=deadline_s))

        try:
            assert await asyncio.wait_for(self._connection.in_thread(work), deadline_s + 1)
        except asyncio.TimeoutError:
            raise DeadlinePassed("-", "waiting for its turn", deadline_s) from None
        return came[0]


@pytest.fixture(params=["tcp in threads", "tcp over TLS in threads"])
def in_threads(request: pytest.FixtureRequest, tls: Tls) -> TcpTransport:
    return TcpTransport(tls=tls if "TLS" in request.param else None)


async def test_a_thread_hears_of_each_part_and_may_ask_for_more_meanwhile(in_threads: TcpTransport) -> None:
    base = bytes(reversed(IMAGE))
    async with serving(in_threads, Held(CONTENT, deltas={base: b"what changed"})) as server:
        connection = await in_threads.connect(server.address, token=TOKEN, deadline_s=5)
        parts: list[bytes] = []
        first, second, third = bytearray(len(CONTENT)), bytearray(1000), bytearray(50)

        def work(reads: Reads, _: Stop) -> None:
            def came(part: memoryview) -> None:
                if not parts:
                    reads.ask(IMAGE, 0, 7, len(second))
                parts.append(bytes(part))

            reads.ask(IMAGE, 0, 0, len(first))
            assert reads.take(memoryview(first), deadline_s=5, came=came) == len(first)
            assert reads.take(memoryview(second), deadline_s=5) == len(second)
            reads.ask(IMAGE, 0, 0, len(third), base)
            assert reads.take(memoryview(third), deadline_s=5, came=came) == 12

        assert await connection.in_thread(work)
        assert b"".join(parts) == first == CONTENT  # of the delta it heard nothing
        assert len(parts) > 1
        assert second == CONTENT[7:1007]
        assert third[:12] == b"what changed"
        assert await read(connection, 3, 100) == CONTENT[3:103]
        await connection.close()


async def test_what_a_thread_does_itself_wrong_leaves_the_connection_usable(in_threads: TcpTransport) -> None:
    async with serving(in_threads, Held(CONTENT)) as server:
        connection = await in_threads.connect(server.address, token=TOKEN, deadline_s=5)

        def work(reads: Reads, _: Stop) -> None:
            reads.ask(IMAGE, 0, 0, 9)
            reads.take(memoryview(bytearray(9)), deadline_s=5)
            raise OSError("the disk is full")

        with pytest.raises(OSError, match="the disk is full"):
            await connection.in_thread(work)
        assert await read(connection, 3, 100) == CONTENT[3:103]
        await connection.close()


async def test_what_a_thread_asked_for_and_did_not_take_is_nobody_elses(in_threads: TcpTransport) -> None:
    async with serving(in_threads, Held(CONTENT)) as server:
        connection = await in_threads.connect(server.address, token=TOKEN, deadline_s=5)
        assert await connection.in_thread(lambda reads, _: reads.ask(IMAGE, 0, 0, 9))
        with pytest.raises(PeerGone):
            await read(connection, 3, 9)
        await connection.close()


async def test_without_a_thread_to_spare_nothing_is_done(
    in_threads: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_THREADS", Spare(1, "test"))
    begun, ends = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        begun.set()
        assert ends.wait(10)

    async with serving(in_threads, Held(CONTENT)) as server:
        one, other = [await in_threads.connect(server.address, token=TOKEN, deadline_s=5) for _ in range(2)]
        holding = asyncio.ensure_future(one.in_thread(hold))
        assert await asyncio.to_thread(begun.wait, 5)
        done: list[object] = []
        assert not await other.in_thread(lambda *_: done.append(1))
        assert await read(other, 3, 100) == CONTENT[3:103]
        ends.set()
        assert await holding
        assert await other.in_thread(lambda *_: done.append(2))
        assert done == [2]
        for connection in (one, other):
            await connection.close()


@pytest.fixture
def sent_by_the_source(transport: Transport) -> None:
    if isinstance(transport, InPlace):
        pytest.skip("a file in place is read without its source")


by_the_source = pytest.mark.usefixtures("sent_by_the_source")


@pytest_asyncio.fixture(
    loop_scope="session",
    params=["memory", "tcp", "tcp over TLS", "tcp in threads", "tcp over TLS in threads", "ucx", "file"],
)
async def transport(request: pytest.FixtureRequest, tls: Tls, tmp_path: Path) -> Transport:
    if request.param == "file":
        return InPlace(tmp_path)
    if request.param == "memory":
        return MemoryTransport(MemoryNetwork())
    if request.param == "ucx":
        if importlib.util.find_spec("ucxx") is None:
            pytest.skip("ucxx is not installed: it has wheels for Linux and Python 3.11 only")
        return UcxTransport(open_lane({"TLS": "tcp,sm,self"}))
    kind = InThreads if request.param.endswith("in threads") else TcpTransport
    return kind(tls=tls if "TLS" in request.param else None)


async def connect(transport: Transport, server: Server, token: bytes = TOKEN) -> Connection:
    return await transport.connect(server.address, token=token, deadline_s=5)


async def read(connection: Connection, offset: int, size: int, image: bytes = IMAGE) -> bytes:
    into = bytearray(size)
    await connection.read_into(image, 0, offset, memoryview(into), deadline_s=10)
    return bytes(into)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, len(CONTENT)), (7, 4096), (MIB - 1, MIB + 2), (len(CONTENT) - 1, 1)]
)
async def test_a_range_arrives_as_it_is_at_the_source(transport: Transport, offset: int, size: int) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        assert await read(connection, offset, size) == CONTENT[offset : offset + size]
        await connection.close()


@pytest.mark.parametrize("in_memory", [True, False], ids=["on the loop", "in a thread"])
@pytest.mark.parametrize(("offset", "size"), [(0, len(CONTENT)), (MIB - 1, MIB + 2), (len(CONTENT) - 1, 1)])
async def test_a_range_of_a_file_arrives_as_it_is_there(
    transport: Transport, tmp_path: Path, offset: int, size: int, in_memory: bool
) -> None:
    held = tmp_path / "a file"
    held.write_bytes(CONTENT)
    async with serving(transport, Held(CONTENT, path=held, in_memory=in_memory)) as server:
        connection = await connect(transport, server)
        assert await read(connection, offset, size) == CONTENT[offset : offset + size]
        assert await read(connection, 5, 1000) == CONTENT[5:1005]
        await connection.close()
        ends = asyncio.get_running_loop().time() + 5
        while is_open(held):
            assert asyncio.get_running_loop().time() < ends, "a handle stayed open"
            await asyncio.sleep(0.02)


def is_open(path: Path) -> bool:
    """Whether this process has a handle of it."""
    return any(link.is_symlink() and str(link.readlink()) == str(path) for link in Path("/proc/self/fd").glob("*"))


async def test_a_delta_of_a_range_of_a_file_is_sent_too(transport: Transport, tmp_path: Path) -> None:
    held, base = tmp_path / "a file", bytes(reversed(IMAGE))
    held.write_bytes(CONTENT)
    async with serving(transport, Held(CONTENT, path=held, deltas={base: b"what changed"})) as server:
        connection = await connect(transport, server)
        into = bytearray(80)
        assert await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5, base=base) == 12
        assert into[:12] == b"what changed"
        assert await connection.read_into(IMAGE, 0, 9, memoryview(into), deadline_s=5, base=bytes(32)) == 80
        assert into == CONTENT[9:89]
        await connection.close()


async def test_a_read_writes_its_range_and_nothing_beside_it(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        into = bytearray(b"\xff" * 300)
        await connection.read_into(IMAGE, 0, 1000, memoryview(into)[100:200], deadline_s=10)
        assert into == b"\xff" * 100 + CONTENT[1000:1100] + b"\xff" * 100
        await connection.close()


async def test_one_connection_serves_many_reads_even_when_they_are_asked_for_at_once(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        parts = await asyncio.gather(*(read(connection, n * 1000, 1000) for n in range(50)))
        assert b"".join(parts) == CONTENT[:50_000]
        await connection.close()


async def test_many_readers_at_once_each_get_their_own_bytes(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:

        async def one(n: int) -> bool:
            connection = await connect(transport, server)
            got = await read(connection, n, 2 * MIB)
            await connection.close()
            return got == CONTENT[n : n + 2 * MIB]

        assert all(await asyncio.gather(*(one(n) for n in range(12))))


@by_the_source
async def test_a_source_that_dies_in_the_middle_of_a_bucket_is_reported_as_gone(transport: Transport) -> None:
    source = Held(pattern(64 * MIB))
    async with serving(transport, source) as server:
        connection = await connect(transport, server)
        into = bytearray(64 * MIB)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=20))
        await until_byte(into, 0)
        await server.close()
        with pytest.raises(PeerGone) as caught:
            await reading
        assert caught.value.address == server.address
        assert not any(into[-8:]), "it came whole: the test did not cut it"
        with pytest.raises(PeerGone):
            await read(connection, 0, 1)


@by_the_source
async def test_what_was_cut_off_is_resumed_in_the_middle_from_another_source(transport: Transport) -> None:
    whole = pattern(64 * MIB)
    into = bytearray(len(whole))
    async with serving(transport, Held(whole)) as server:
        connection = await connect(transport, server)
        await read_into_part(connection, into, 0, 16 * MIB)
        reading = asyncio.create_task(read_into_part(connection, into, 16 * MIB, len(whole)))
        await until_byte(into, 16 * MIB)
        await server.close()
        with pytest.raises(PeerGone):
            await reading
    async with serving(transport, Held(whole)) as another:
        connection = await connect(transport, another)
        await read_into_part(connection, into, 16 * MIB, len(whole))
        await connection.close()
    assert hashlib.sha256(into).digest() == hashlib.sha256(whole).digest()


@pytest.mark.parametrize("in_memory", [False, True], ids=["opened", "at hand"])
async def test_what_is_on_its_way_to_the_source_is_waited_for(transport: Transport, in_memory: bool) -> None:
    source = Held(CONTENT, there=MIB, in_memory=in_memory)
    async with serving(transport, source) as server:
        connection = await connect(transport, server)
        assert await read(connection, 0, MIB) == CONTENT[:MIB]
        reading = asyncio.create_task(read(connection, MIB, MIB))
        await asyncio.sleep(0.05)
        source.come(MIB + 1)  # more, and not enough
        await asyncio.sleep(0.05)
        assert not reading.done()
        source.come(2 * MIB)
        assert await reading == CONTENT[MIB : 2 * MIB]
        await connection.close()


async def test_a_reader_that_waits_is_told_how_much_there_is_and_may_go_on(transport: Transport) -> None:
    source = Held(CONTENT, there=MIB)
    async with serving(transport, source) as server:
        connection = await connect(transport, server)
        with pytest.raises(NotYet) as caught:
            await read(connection, MIB, 1)
        assert (caught.value.image, caught.value.held_bytes) == (IMAGE, MIB)
        assert await read(connection, 0, MIB) == CONTENT[:MIB]
        await connection.close()


async def test_who_names_a_base_gets_its_delta_at_the_beginning_of_his_memory(transport: Transport) -> None:
    base, delta = bytes(reversed(IMAGE)), b"what changed"
    async with serving(transport, Held(CONTENT, deltas={base: delta})) as server:
        connection = await connect(transport, server)
        into = bytearray(b"\xff" * 100)
        asked = memoryview(into)[10:90]
        assert await connection.read_into(IMAGE, 0, 0, asked, deadline_s=5, base=base) == len(delta)
        assert into == b"\xff" * 10 + delta + b"\xff" * (90 - len(delta))
        assert await connection.read_into(IMAGE, 0, 0, asked, deadline_s=5, base=OTHER_IMAGE) == 80
        assert into[10:90] == CONTENT[:80]
        assert await connection.read_into(IMAGE, 0, 80, asked, deadline_s=5) == 80
        assert into[10:90] == CONTENT[80:160]
        await connection.close()


async def test_for_a_delta_that_is_at_hand_the_range_is_not_opened(transport: Transport) -> None:
    base, delta = bytes(reversed(IMAGE)), b"what changed"
    source = Held(CONTENT, made_before={base: delta})
    async with serving(transport, source) as server:
        connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        into = bytearray(80)
        assert await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5, base=base) == len(delta)
        assert into[: len(delta)] == delta
        assert not source.opened.is_set()
        await connection.close()


async def test_a_delta_that_is_no_shorter_than_the_range_is_not_sent(transport: Transport) -> None:
    base = bytes(reversed(IMAGE))
    async with serving(transport, Held(CONTENT, deltas={base: b"12345"})) as server:
        connection = await connect(transport, server)
        into = bytearray(5)
        assert await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5, base=base) == 5
        assert into == CONTENT[:5]
        with pytest.raises(ValueError, match="digest has 32 bytes"):
            await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5, base=b"short")
        await connection.close()


async def test_wrong_bytes_are_passed_on_as_they_are_for_the_reader_to_detect(transport: Transport) -> None:
    wrong = bytearray(CONTENT)
    wrong[MIB] ^= 1
    async with serving(transport, Held(bytes(wrong))) as server:
        connection = await connect(transport, server)
        got = await read(connection, 0, len(CONTENT))
        assert hashlib.sha256(got).digest() != hashlib.sha256(CONTENT).digest()
        assert got == wrong
        await connection.close()


async def test_after_a_cancelled_read_nothing_is_written_and_the_connection_is_over(transport: Transport) -> None:
    async with serving(transport, Held(pattern(64 * MIB))) as server:
        connection = await connect(transport, server)
        into = bytearray(64 * MIB)
        reading = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=20))
        await until_byte(into, 0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not any(into[-8:]), "it came whole: the test did not cut it"
        into[:] = bytes(len(into))
        await asyncio.sleep(0.1)
        assert not any(into)
        with pytest.raises(PeerGone):
            await read(connection, 0, 1)
        again = await connect(transport, server)
        assert await read(again, 0, 9) == pattern(9)
        await again.close()


async def test_a_read_past_its_deadline_ends_and_says_so(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT, gate=threading.Event())) as server:
        connection = await connect(transport, server)
        with pytest.raises(DeadlinePassed) as caught:
            await connection.read_into(IMAGE, 0, 0, memoryview(bytearray(9)), deadline_s=0.2)
        assert caught.value.deadline_s == 0.2
        assert caught.value.address == server.address
        with pytest.raises(PeerGone):
            await read(connection, 0, 1)


async def test_a_read_that_waits_for_its_turn_has_a_deadline_too_and_disturbs_no_other(transport: Transport) -> None:
    source = Held(CONTENT, gate=threading.Event())
    async with serving(transport, source) as server:
        connection = await connect(transport, server)
        first = asyncio.create_task(read(connection, 0, 100))
        assert await asyncio.to_thread(source.opened.wait, 10)
        with pytest.raises(DeadlinePassed):
            await connection.read_into(IMAGE, 0, 0, memoryview(bytearray(9)), deadline_s=0.2)
        assert source.gate is not None
        source.gate.set()
        assert await first == CONTENT[:100]
        await connection.close()


async def test_a_token_that_is_not_good_reads_nothing(transport: Transport) -> None:
    source = Held(CONTENT)
    async with serving(transport, source) as server:
        connection = await connect(transport, server, token=b"some other token")
        with pytest.raises(TokenRefused) as caught:
            await read(connection, 0, 9)
        assert (caught.value.address, caught.value.image) == (server.address, IMAGE)
        assert not source.opened.is_set()
        await connection.close()


async def test_a_token_for_one_image_opens_no_other_and_the_connection_is_over(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        assert await read(connection, 0, 9) == CONTENT[:9]
        with pytest.raises(TokenRefused):
            await read(connection, 0, 9, image=OTHER_IMAGE)
        with pytest.raises(PeerGone):
            await read(connection, 0, 9)
        another = await connect(transport, server)
        assert await read(another, 0, 9) == CONTENT[:9]
        await another.close()


@by_the_source
async def test_a_token_that_expires_ends_reading_over_the_connection_it_opened(transport: Transport) -> None:
    valid = True
    server = await transport.serve(Held(CONTENT), "127.0.0.1:0", check=lambda token, image: valid)
    connection = await connect(transport, server)
    assert await read(connection, 0, 9) == CONTENT[:9]
    valid = False
    with pytest.raises(TokenRefused):
        await read(connection, 0, 9)
    await connection.close()
    await server.close()


async def test_what_is_not_held_is_refused_with_the_range_and_the_connection_stays(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        with pytest.raises(NotHeld) as caught:
            await read(connection, len(CONTENT) - 1, 2)
        assert (caught.value.image, caught.value.offset, caught.value.size) == (IMAGE, len(CONTENT) - 1, 2)
        assert "only one file" in str(caught.value)
        assert await read(connection, 0, 9) == CONTENT[:9]
        await connection.close()


@pytest.mark.parametrize("fault", ["unreadable", "short"])
async def test_a_source_that_cannot_give_the_whole_range_does_not_hold_it(transport: Transport, fault: str) -> None:
    class Faulty(Held):
        def open(self, image: bytes, file: int, offset: int, size: int) -> memoryview:
            if fault == "unreadable":
                raise PermissionError("not yours")
            return memoryview(CONTENT)[: size - 1]

    server = await transport.serve(Faulty(CONTENT), "127.0.0.1:0", check=lambda token, image: True)
    connection = await connect(transport, server)
    with pytest.raises(NotHeld):
        await read(connection, 0, 9)
    await connection.close()
    await server.close()


async def test_where_nobody_listens_the_peer_is_gone(transport: Transport) -> None:
    server = await transport.serve(Held(CONTENT), "127.0.0.1:0", check=lambda token, image: True)
    await server.close()
    with pytest.raises(PeerGone) as caught:
        await connect(transport, server)
    assert caught.value.address == server.address


async def test_closing_a_connection_ends_the_read_under_way(transport: Transport) -> None:
    source = Held(CONTENT, gate=threading.Event())
    async with serving(transport, source) as server:
        connection = await connect(transport, server)
        reading = asyncio.create_task(read(connection, 0, 9))
        assert await asyncio.to_thread(source.opened.wait, 10)
        await connection.close()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(reading, 5)
        await connection.close()


async def test_an_impossible_read_is_the_callers_mistake(transport: Transport) -> None:
    async with serving(transport, Held(CONTENT)) as server:
        connection = await connect(transport, server)
        for image, offset, size in ((b"short", 0, 1), (IMAGE, -1, 1), (IMAGE, 0, 0)):
            with pytest.raises(ValueError, match=r"digest|possible"):
                await connection.read_into(image, 0, offset, memoryview(bytearray(size)), deadline_s=5)
        with pytest.raises(ValueError, match="token of 513 bytes"):
            await connect(transport, server, token=b"x" * 513)
        await connection.close()


async def read_into_part(connection: Connection, into: bytearray, begin: int, end: int) -> None:
    await connection.read_into(IMAGE, 0, begin, memoryview(into)[begin:end], deadline_s=20)


async def until_byte(into: bytearray, at: int) -> None:
    """Returns when that byte has come, at the very next turn of the event loop."""

    async def come() -> None:
        # Of pattern's first eight bytes the lowest is never zero.
        while into[at] == 0:  # noqa: ASYNC110  the transport sets no event
            await asyncio.sleep(0)

    await asyncio.wait_for(come(), 20)
