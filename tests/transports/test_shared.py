"""What is of shared folders alone: what is read in place, and what is not though a source says so."""

import asyncio
import os
from pathlib import Path

import pytest
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, pattern, serving

from hotweights.transports.base import Connection, Place
from hotweights.transports.errors import DeadlinePassed, PeerGone, TokenRefused
from hotweights.transports.shared import PIECE_BYTES, SharedTransport, is_below
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
    source.place = Place(str(root / "pipe"), 0, 0)
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


async def test_a_file_system_that_hangs_is_left_at_the_deadline_and_nothing_is_written_afterwards(
    source: Held, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, goes_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hangs(place: Place, offset: int, into: memoryview) -> None:
        loop.call_soon_threadsafe(hung.set)
        asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(10)
        into[:] = b"\xff" * len(into)

    monkeypatch.setattr("hotweights.transports.shared.read_range", hangs)
    async with serving(TcpTransport(), source) as server:
        connection, into = await connect(server.address, root), bytearray(99)
        with pytest.raises(DeadlinePassed):
            await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=0.2)
        with pytest.raises(PeerGone):
            await read(connection)
        another = await connect(server.address, root)
        reading = asyncio.ensure_future(another.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=10))
        hung.clear()
        await asyncio.wait_for(hung.wait(), 10)
        await another.close()
        with pytest.raises(PeerGone):
            await reading
        goes_on.set()
        await asyncio.sleep(0.2)
        assert into == bytes(99)


def test_below_is_told_by_where_links_lead(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "in").mkdir(parents=True)
    (tmp_path / "mount").symlink_to(real)
    assert is_below(str(tmp_path / "mount" / "in" / "file"), [real])
    assert is_below(str(real / "in" / "file"), [tmp_path / "mount"])
    assert not is_below(str(real), [real])
    assert not is_below("in/file", [real])
