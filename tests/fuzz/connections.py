"""The tcp transport, both sides, over real sockets of this machine: the other side says anything at all."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any

from tests.fuzz.kinds import Target

from hotweights.transports import frames
from hotweights.transports.base import Place
from hotweights.transports.errors import NotHeld, TransportError
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import Limits, Peer, TcpServer

IMAGE, TOKEN = b"i" * 32, b"good"
CONTENT = bytes(range(256)) * 4
# Nothing here waits that long unless something hangs.
DEADLINE_S = 10.0


class _Held:
    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> memoryview | None:
        return None

    def open(self, image: bytes, file: int, offset: int, size: int) -> memoryview:
        if image != IMAGE or file != 0 or offset + size > len(CONTENT):
            raise NotHeld(image, file, offset, size, "only one file of one image here")
        return memoryview(CONTENT)[offset : offset + size]

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> bytes | None:
        return None

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        return bytes(view[: len(view) // 2])

    def locate(self, image: bytes, file: int) -> Place | None:
        return Place("/nowhere/at/all", 1, 2)

    async def until_more(self, image: bytes) -> None: ...


class _Room:
    """A loop, a server and a listener, made once: setting them up costs more than a connection."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.server: TcpServer = self.run(self._serve())

    async def _serve(self) -> TcpServer:
        limits = Limits(hello_s=DEADLINE_S, idle_s=DEADLINE_S, stall_s=DEADLINE_S)
        return await TcpTransport(limits).serve(_Held(), check=lambda token, image: token == TOKEN and image == IMAGE)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, DEADLINE_S))

    def close(self) -> None:
        self.run(self.server.close())
        self.listener.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


_room: _Room | None = None


def room() -> _Room:
    global _room
    if _room is None:
        _room = _Room()
    return _room


def leave() -> None:
    """Closes what was opened."""
    global _room
    if _room is not None:
        _room.close()
        _room = None


def server(data: bytes) -> None:
    """What it answers are whole frames, data only for the good token, and never other bytes than were asked for."""
    here = room()
    with socket.create_connection(here.address) as client:
        peer, _ = here.listener.accept()
        peer.setblocking(False)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        here.run(here.server._serve_connection(Peer(peer, "fuzz", "fuzz")))
        client.settimeout(DEADLINE_S)
        answer = _read_all(client)
    assert here.server._accepting.done() is False
    _check_answers(data, answer)


def _read_all(sock: socket.socket) -> bytes:
    answer = b""
    try:
        while got := sock.recv(65536):
            answer += got
    except ConnectionResetError:  # it closed with words of ours unread
        pass
    return answer


def _check_answers(data: bytes, answer: bytes) -> None:
    at = 0
    while at + 5 <= len(answer):
        size, kind = int.from_bytes(answer[at : at + 4], "big"), frames.Kind(answer[at + 4])
        body, at = answer[at + 5 : at + 5 + size], at + 5 + size
        assert kind in (frames.Kind.WELCOME, frames.Kind.DATA, frames.Kind.REFUSED, frames.Kind.LOCATED)
        if kind is frames.Kind.DATA:
            count = frames.parse_data(kind, body)
            given = answer[at : at + count]
            assert given in CONTENT
            assert frames.hello(TOKEN) == data[: len(frames.hello(TOKEN))]
            at += count


def client(data: bytes) -> None:
    """A source that says anything: every read ends as base.py promises, and only with bytes that were sent."""
    room().run(_read_from(data))


async def _read_from(data: bytes) -> None:
    here = room()
    connecting = asyncio.ensure_future(
        TcpTransport().connect("{}:{}".format(*here.address), token=TOKEN, deadline_s=DEADLINE_S)
    )
    peer = await asyncio.to_thread(lambda: here.listener.accept()[0])
    with peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        try:
            connection = await connecting
            try:
                place = await connection.locate(IMAGE, 0, deadline_s=DEADLINE_S)
                assert place is None or os.fsencode(place.path) in data
                for offset, size in ((0, 16), (5, 9), (0, 1)):
                    into = bytearray(size)
                    try:
                        await connection.read_into(IMAGE, 0, offset, memoryview(into), deadline_s=DEADLINE_S)
                    except NotHeld:
                        continue  # a refusal leaves the connection as it was
                    assert bytes(into) in data
            finally:
                await connection.close()
        except TransportError:
            pass


def _reads(*ranges: tuple[int, int], token: bytes = TOKEN) -> bytes:
    return frames.hello(token) + b"".join(frames.read(IMAGE, 0, offset, size) for offset, size in ranges)


def _served(*sizes: int, place: Place | None = None) -> bytes:
    """Of a source that says where its file is, where a `place` is given."""
    answers = b"".join(frames.data(size) + CONTENT[:size] for size in sizes)
    if place is None:
        return frames.frame(frames.Kind.WELCOME) + answers
    return frames.welcome(frames.Can.LOCATE) + frames.located(place) + answers


TARGETS = {
    "tcp_server": Target(
        server,
        lambda: [
            *(_reads((0, 16), (100, 900)), _reads((0, 2000)), _reads((0, 1), token=b"bad"), frames.hello(b"x" * 600)),
            frames.hello(TOKEN) + frames.locate(IMAGE, 0) + frames.locate(b"o" * 32, 9),
            frames.hello(TOKEN) + frames.read_cast(b"j" * 16, IMAGE, 0, 0, 16) + frames.read(IMAGE, 0, 0, 9),
            *(b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, frames.frame(frames.Kind.WELCOME)),
        ],
        mutations=600,
    ),
    "tcp_client": Target(
        client,
        lambda: [
            _served(16, 9, 1, place=Place("/somewhere", 1, 2)),
            *(_served(16, 9, 1), _served(16), _served(17), b"", b"\x16\x03\x01\0\xa5\1" * 9),
            frames.refused(frames.Why.BUSY, "full"),
            _served() + frames.refused(frames.Why.NOT_HELD, "é") + frames.refused(frames.Why.TOKEN),
        ],
        mutations=400,
    ),
}
