"""Raw bytes against the coordinator's live port: whatever comes, those who speak the protocol are served on."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from tests.coordinator.live import DEADLINE_S, Live, Wire, agent_hello, running, soon

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.wire.channel import open_channel

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
GARBAGE = {
    "nothing": b"",
    "one byte": b"\0",
    "random": random.Random(7).randbytes(100_000),
    "HTTP/1": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/1 with a huge header": b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "half a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20),
    "half a preface": PREFACE[:10],
    "a preface and nonsense": PREFACE + b"\xff" * 5000,
    "a frame that is never finished": PREFACE + SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1",
    "headers without end": PREFACE + SETTINGS + (b"\0\x40\0\1\0\0\0\0\1" + bytes(0x4000)) * 20,
}


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    async with running() as started:
        yield started


@pytest.mark.parametrize("hangs_up", [True, False])
@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_ends_nobody_elses_call(live: Live, what: str, hangs_up: bool) -> None:
    session = await Wire(live).hello(agent_hello("n1"))
    watch = live.service.WatchEvents(pb.WatchEventsRequest())
    await soon(watch.initial_metadata())
    writers = []
    for _ in range(5):
        _, writer = await asyncio.open_connection(live.endpoint.host, live.endpoint.port)
        writers.append(writer)
        writer.write(GARBAGE[what])
        if hangs_up:
            writer.close()
    await live.publish("v1")
    (event, *_) = (await soon(watch.read())).events
    assert event.version == "v1"
    await session.say(heartbeat={})
    async with open_channel(live.endpoint) as fresh:
        check: Any = fresh.unary_unary("/grpc.health.v1.Health/Check")
        await soon(check(b""))
    assert live.state.nodes["n1"].connected
    for writer in writers:
        writer.close()
    await session.close()


async def test_metadata_beyond_all_bounds_is_refused_and_the_next_call_is_answered(live: Live) -> None:
    huge = tuple((f"x-{n}", os.urandom(3000).hex()) for n in range(20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live.service.GetStatus(pb.GetStatusRequest(), metadata=huge, timeout=DEADLINE_S)
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    await live.status()


async def test_a_message_beyond_the_limit_is_refused_and_the_next_call_is_answered(live: Live) -> None:
    raw: Any = live.channel.unary_unary("/hotweights.v1.CoordinatorService/GetStatus")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(bytes(5 << 20), timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await live.status()


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xff"])
async def test_a_message_that_is_none_is_an_error_of_that_call_alone(live: Live, body: bytes) -> None:
    raw: Any = live.channel.unary_unary("/hotweights.v1.CoordinatorService/StartUpdate")
    with pytest.raises(grpc.aio.AioRpcError):
        await raw(body, timeout=DEADLINE_S)
    await live.status()
