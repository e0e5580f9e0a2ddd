"""A link that is cut in the middle of a bucket, for shorter and for longer than the reader's deadline.

The source is in a network namespace of its own; `ip link set down` cuts it off.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from benchmarks import netns
from tests.transports.sources import IMAGE, MIB, TOKEN, pattern

from hotweights.transports.base import Connection
from hotweights.transports.errors import DeadlinePassed, PeerGone, TransportError
from hotweights.transports.tcp import TcpTransport

SIZE_MIB, BYTES_S = 8, 4e6  # two seconds


@pytest.fixture
def source() -> Iterator[tuple[netns.Node, str]]:
    """Where it is, and its address."""
    try:
        netns.check()
    except netns.NoNamespaces as missing:
        pytest.skip(str(missing))
    with netns.nodes(1, 1000.0) as (node,):
        command = [
            sys.executable,
            "-m",
            "tests.transports.tcp_source",
            f"{node.address}:0",
            str(SIZE_MIB),
            str(BYTES_S),
        ]
        with subprocess.Popen(node.command(command), stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield node, process.stdout.readline().strip()
            finally:
                process.kill()


def link(node: netns.Node, state: str) -> None:
    subprocess.run(["ip", "link", "set", f"{node.name}-out", state], check=True, timeout=10)


async def connect(address: str) -> Connection:
    return await TcpTransport().connect(address, token=TOKEN, deadline_s=20)


async def begin(connection: Connection, into: bytearray, deadline_s: float) -> "asyncio.Task[int]":
    """A read of all of it, some of which has come."""
    task = asyncio.create_task(connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=deadline_s))
    ends = time.monotonic() + 10
    while not into[0]:
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)
    return task


async def test_a_link_that_comes_back_within_the_deadline_costs_time_and_no_more(
    source: tuple[netns.Node, str],
) -> None:
    node, address = source
    connection, into = await connect(address), bytearray(SIZE_MIB * MIB)
    reading = await begin(connection, into, 30)
    link(node, "down")
    await asyncio.sleep(1)
    link(node, "up")
    assert await reading == len(into)
    assert into == pattern(len(into))
    await connection.close()


async def test_a_link_that_stays_away_is_left_at_the_deadline_and_nothing_is_written_afterwards(
    source: tuple[netns.Node, str],
) -> None:
    node, address = source
    connection, into = await connect(address), bytearray(SIZE_MIB * MIB)
    reading = await begin(connection, into, 1.0)
    link(node, "down")
    with pytest.raises(DeadlinePassed):
        await reading
    into[:] = bytes(len(into))
    with pytest.raises(TransportError):
        await TcpTransport().connect(address, token=TOKEN, deadline_s=0.5)
    link(node, "up")
    await asyncio.sleep(1)
    assert not any(into)
    with pytest.raises(PeerGone):
        await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=5)
    again = await connect(address)
    assert await again.read_into(IMAGE, 0, 0, memoryview(into)[:MIB], deadline_s=20) == MIB
    assert into[:MIB] == pattern(MIB)
    await again.close()
