"""What is of shared folders alone: what is read in place, and what is not though a source says so."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, pattern, serving

from hotweights.transports.base import Connection, Place
from hotweights.transports.errors import DeadlinePassed, PeerGone, TokenRefused
from hotweights.transports.shared import (
    PIECE_BYTES,
    READS_MAX,
    SharedConnection,
    SharedFolders,
    SharedTransport,
    is_below,
)
from hotweights.transports.tcp import TcpTransport

CONTENT = pattern(PIECE_BYTES + 3 * MIB + 5)
OTHER = bytes(len(CONTENT))


def place_of(file: Path) -> Place:
    status = file.stat()
    return Place(str(file), status.st_size, status.st_mtime_ns)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "held").write_bytes(CONTENT)
    return folder


@pytest.fixture
def source(root: Path) -> Held:
    """Whoever reads over the wire gets other bytes than who reads in place."""
    return Held(OTHER, place=place_of(root / "held"))


async def connect(address: str, root: Path, token: bytes = TOKEN) -> Connection:
    return await SharedTransport(TcpTransport(), [root]).connect(address, token=token, deadline_s=5)


async def read(connection: Connection, offset: int = 0, size: int = len(CONTENT), base: bytes | None = None) -> bytes:
    into = bytearray(size)
    came = await connection.read_into(IMAGE, 0, offset, memoryview(into), deadline_s=10, base=base)
    return bytes(into[:came])


async def way_of(source: Held, root: Path, expected: bytes = OTHER) -> str:
    """How everything is read, which has to be what is expected."""
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root)
        assert await read(connection) == await read(connection) == expected
        await connection.close()
        return connection.way


async def test_what_both_see_is_read_in_place(source: Held, root: Path) -> None:
    assert await way_of(source, root, CONTENT) == "file"
    assert not source.opened.is_set()


async def test_a_range_in_the_middle_is_that_range(source: Held, root: Path) -> None:
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root)
        assert await read(connection, PIECE_BYTES - 7, 99) == CONTENT[PIECE_BYTES - 7 : PIECE_BYTES + 92]
        await connection.close()


async def test_whose_token_is_not_good_is_not_told_where_a_file_is(source: Held, root: Path) -> None:
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root, b"another")
        with pytest.raises(TokenRefused):
            await read(connection)


@pytest.mark.parametrize(
    "name", ["../secret", "link", ".", "", "held\0", "../shared-too/held", "x" * 5000], ids=lambda name: repr(name[:9])
)
async def test_nothing_is_opened_beyond_what_is_shared_whatever_a_source_says(root: Path, name: str) -> None:
    for beside in (root.parent / "secret", root.parent / "shared-too" / "held"):
        beside.parent.mkdir(exist_ok=True)
        beside.write_bytes(CONTENT)
    (root / "link").symlink_to(root.parent / "secret")
    source = Held(OTHER, place=Place(f"{root}/{name}" if name else "held", len(CONTENT), 0))
    if "\0" in name:
        async with serving(TcpTransport(), source) as server:
            connection = await connect(server.address, root)
            with pytest.raises(PeerGone, match="does not say where"):
                await read(connection)
        return
    assert "tcp" in await way_of(source, root)


async def test_a_pipe_in_the_folder_keeps_nobody(source: Held, root: Path) -> None:
    os.mkfifo(root / "pipe")
    source.place = Place(str(root / "pipe"), len(CONTENT), 0)
    assert "the file there is another" in await way_of(source, root)


async def test_a_file_that_was_written_to_since_is_not_read(source: Held, root: Path) -> None:
    (root / "held").write_bytes(CONTENT)
    os.utime(root / "held", ns=(0, 1))
    assert await way_of(source, root) == "tcp (not from the shared folder: the file there is another)"


async def test_a_node_that_does_not_see_the_folder_reads_over_the_wire_and_says_why(source: Held, root: Path) -> None:
    (root / "held").unlink()
    assert await way_of(source, root) == "tcp (not from the shared folder: No such file or directory)"


async def test_a_delta_is_asked_of_the_source_for_it_is_less_to_read(source: Held, root: Path) -> None:
    source.deltas[b"b" * 32] = b"what changed"
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root)
        assert await read(connection, base=b"b" * 32) == b"what changed"
        assert connection.way == "tcp"
        await connection.close()


async def test_a_source_that_says_nothing_of_files_is_read_over_the_wire(root: Path) -> None:
    assert await way_of(Held(OTHER), root) == "tcp"


async def test_where_bytes_came_from_is_known_beneath_what_is_told_of_their_way() -> None:
    class Cast:
        way, origin = "mpi", "mpi"

        async def read_into(self, *_: object, **__: object) -> int:
            return 4

        def doubt(self, image: bytes, file: int, origin: str) -> bool:
            return origin == "mpi"

    folders = SharedFolders([])
    folders.doubt(IMAGE, 0, "its bytes are another version's")
    connection = SharedConnection(Cast(), "a source", folders)  # type: ignore[arg-type]
    await connection.read_into(IMAGE, 0, 0, memoryview(bytearray(4)), deadline_s=1)
    assert connection.way == "mpi (not from the shared folder: its bytes are another version's)"
    assert connection.doubt(IMAGE, 0, connection.origin)


async def test_what_was_wrong_there_is_read_from_the_source_over_whatever_connection(source: Held, root: Path) -> None:
    transport = SharedTransport(TcpTransport(), [root])
    async with serving(TcpTransport(), source) as server:
        connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        assert await read(connection) == CONTENT
        assert connection.doubt(IMAGE, 0, connection.origin)
        assert await read(connection) == OTHER
        assert not connection.doubt(IMAGE, 0, connection.origin)
        another = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        assert await read(another) == OTHER
        assert another.way == "tcp (not from the shared folder: its bytes are another version's)"
        await connection.close()
        await another.close()


async def test_a_file_that_became_a_link_to_elsewhere_is_not_read_any_more(source: Held, root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_bytes(CONTENT)
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root)
        assert await read(connection) == CONTENT
        stamp = (root / "held").stat().st_mtime_ns
        (root / "held").unlink()
        (root / "held").symlink_to(secret)
        os.utime(secret, ns=(stamp, stamp))
        assert await read(connection) == OTHER
        assert "beyond what is shared" in connection.way
        await connection.close()


async def test_a_time_that_no_frame_can_tell_is_no_place(source: Held, root: Path) -> None:
    os.utime(root / "held", ns=(0, -1_000_000_000))
    source.place = place_of(root / "held")
    assert await way_of(source, root) == "tcp"


async def test_a_file_system_that_hangs_is_left_for_a_while_and_nothing_is_written_afterwards(
    source: Held, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, hung = threading.Event(), threading.Event()

    def hangs(place: Place, roots: object, offset: int, into: memoryview) -> None:
        hung.set()
        assert goes_on.wait(20)
        into[:] = b"\xff" * len(into)

    monkeypatch.setattr("hotweights.transports.shared.read_range", hangs)
    transport = SharedTransport(TcpTransport(), [root])
    async with serving(TcpTransport(), source) as server:

        async def reading() -> "tuple[Connection, asyncio.Future[int]]":
            """Of one that hangs by now."""
            hung.clear()
            connection = await transport.connect(server.address, token=TOKEN, deadline_s=5)
            going = asyncio.ensure_future(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=0.5))
            assert await asyncio.to_thread(hung.wait, 10)
            return connection, going

        into = bytearray(99)
        closed, ends_closed = await reading()
        called_off, ends_called_off = await reading()
        late, ends_late = await reading()
        await closed.close()
        with pytest.raises(PeerGone):
            await ends_closed
        ends_called_off.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ends_called_off
        again, ends_again = await reading()  # none of these says that the folder hangs
        for ends in (ends_late, ends_again):
            with pytest.raises(DeadlinePassed):
                await ends
        for connection in (called_off, late, again):
            with pytest.raises(PeerGone):
                await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
        other = await transport.connect(server.address, token=TOKEN, deadline_s=5)
        assert await read(other) == OTHER
        assert other.way == "tcp (not from the shared folder: a read there did not end in time)"
        await other.close()
        goes_on.set()
        await asyncio.sleep(0.2)
        assert into == bytes(99)


async def test_reads_that_never_end_take_no_thread_of_others(source: Held, root: Path, monkeypatch: Any) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr("hotweights.transports.shared.read_range", lambda *_: goes_on.wait(20))
    folders = SharedFolders([root])
    hanging = [
        asyncio.ensure_future(folders.in_thread(lambda: folders.read(place_of(root / "held"), 0, memoryview(b""))))
        for _ in range(READS_MAX)
    ]
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="too many reads"):
        await folders.in_thread(lambda: None)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
    goes_on.set()
    await asyncio.gather(*hanging)
    with pytest.raises(ZeroDivisionError):  # whatever it is, it is told, and takes no place for good
        await asyncio.wait_for(folders.in_thread(lambda: 1 // 0), 5)


async def test_a_read_that_gives_up_while_it_waits_leaves_the_one_before_it_alone(root: Path) -> None:
    source = Held(OTHER, gate=threading.Event())
    async with serving(TcpTransport(), source) as server:
        connection = await connect(server.address, root)
        first = asyncio.ensure_future(read(connection, 0, 99, base=b"b" * 32))
        assert await asyncio.to_thread(source.opened.wait, 10)
        with pytest.raises(DeadlinePassed):
            await connection.read_into(IMAGE, 0, 0, memoryview(bytearray(9)), deadline_s=0.2)
        assert source.gate is not None
        source.gate.set()
        assert await first == bytes(99)
        await connection.close()


def test_below_is_told_by_where_links_lead(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "in").mkdir(parents=True)
    (tmp_path / "mount").symlink_to(real)
    assert is_below(str(tmp_path / "mount" / "in" / "file"), [real])
    assert is_below(str(real / "in" / "file"), [tmp_path / "mount"])
    assert not is_below(str(real), [real])
    assert not is_below("in/file", [real])
