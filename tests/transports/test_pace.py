"""The limit on bytes a second: on average it holds, whoever asks, and without one nobody waits."""

import asyncio

import pytest
from tests.transports.sources import IMAGE, MIB, TOKEN, Held, accept_good_token, pattern

from hotweights.transports.pace import BURST_S, Pace
from hotweights.transports.tcp import TcpTransport


async def test_all_who_ask_share_one_rate() -> None:
    pace, loop = Pace(1e6), asyncio.get_running_loop()
    begun = loop.time()

    async def some() -> None:
        for _ in range(10):
            await pace.take(20_000)

    await asyncio.gather(some(), some(), some())
    assert loop.time() - begun >= 0.6 - 2 * BURST_S  # 600 kB at 1 MB/s


async def test_what_was_not_used_is_not_saved_up() -> None:
    pace, loop = Pace(1e6), asyncio.get_running_loop()
    await pace.take(1)
    await asyncio.sleep(0.5)
    begun = loop.time()
    for _ in range(5):
        await pace.take(100_000)
    assert loop.time() - begun >= 0.5 - 2 * BURST_S


async def test_without_a_limit_nobody_waits() -> None:
    pace = Pace()
    assert pace.piece_bytes is None
    for _ in range(1000):
        await pace.take(1 << 40)


@pytest.mark.parametrize("readers", [1, 3])
async def test_a_server_sends_no_faster_to_all_its_readers_together(readers: int) -> None:
    content = pattern(MIB)
    server = await TcpTransport(pace=Pace(readers * 2e6)).serve(Held(content), check=accept_good_token)
    loop = asyncio.get_running_loop()

    async def read() -> bytes:
        connection = await TcpTransport().connect(server.address, token=TOKEN, deadline_s=5)
        into = bytearray(MIB)
        await connection.read_into(IMAGE, 0, 0, memoryview(into), deadline_s=20)
        await connection.close()
        return bytes(into)

    begun = loop.time()
    got = await asyncio.gather(*(read() for _ in range(readers)))
    assert loop.time() - begun >= MIB / 2e6 - 2 * BURST_S
    assert all(part == content for part in got)
    await server.close()
