"""Deltas that an agent gives: those made before unread, the others in memory that is used again."""

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotweights.transports.base import in_memory, open_shortest
from hotweights.v1 import manifest_pb2
from hotweights.worker_client.agent.data import MAKING_MAX, DataPort
from hotweights.worker_client.agent.deltas import ROOM_KEPT_BYTES, TRIED_OF, USELESS_MAX, Rooms, Worth
from hotweights.worker_client.agent.folders import Folders
from hotweights.worker_client.stage.stage import Stage

IMAGE, BASE = bytes(range(32)), b"b" * 32


@pytest.fixture
def port(tmp_path: Path) -> DataPort:
    return DataPort("n", Stage(tmp_path / "stage"), Folders(tmp_path / "served.json", 1 << 20, lambda: None))


async def test_a_delta_that_is_there_is_given_though_the_bucket_is_not(port: DataPort) -> None:
    port.received(IMAGE, BASE, manifest_pb2.Bucket(file=0, offset=8, size_bytes=100), b"delta")
    port.served_at = 0.0
    assert bytes(in_memory(await open_shortest(port, IMAGE, 0, 8, 100, BASE))) == b"delta"
    assert port.served_at > 0, "an agent that gives deltas is not idle"


def test_to_a_base_that_is_not_here_there_is_no_delta_and_nobody_waits_to_hear_so(port: DataPort) -> None:
    with ExitStack() as busy:
        for _ in range(MAKING_MAX):
            busy.enter_context(port._rooms.take(1))
        asking = threading.Thread(target=port.delta, args=(IMAGE, BASE, 0, 0, memoryview(bytes(100))), daemon=True)
        asking.start()
        asking.join(10)
        assert not asking.is_alive()


def test_a_room_is_as_large_as_was_asked_for_and_used_again_unless_it_is_large() -> None:
    rooms = Rooms(2)
    with rooms.take(100) as first, rooms.take(200) as second:
        assert (len(first), len(second)) == (100, 200)
        memory = first.obj, second.obj
    with rooms.take(50) as again:
        assert len(again) == 50
    with rooms.take(10) as small, rooms.take(10) as another:
        assert small.obj is not another.obj
        assert {id(small.obj), id(another.obj)} & {id(one) for one in memory}
    with rooms.take(ROOM_KEPT_BYTES + 1) as large:
        kept = large.obj
    with rooms.take(10) as one, rooms.take(10) as other:
        assert one.obj is not kept
        assert other.obj is not kept


def test_so_many_rooms_and_no_more_are_out_at_once() -> None:
    rooms, third = Rooms(2), threading.Event()

    def take() -> None:
        with rooms.take(1):
            third.set()

    with rooms.take(1), rooms.take(1):
        waiting = threading.Thread(target=take, daemon=True)
        waiting.start()
        assert not third.wait(0.2)
    assert third.wait(10)
    waiting.join(10)


def test_where_deltas_were_of_no_use_only_a_few_are_tried_until_one_is() -> None:
    worth = Worth()
    tried = 0
    for _ in range(USELESS_MAX + 10 * TRIED_OF):
        if worth.is_tried(IMAGE, BASE):
            tried += 1
            worth.tell(IMAGE, BASE, useful=False)
    assert USELESS_MAX + 8 <= tried <= USELESS_MAX + 11
    assert worth.is_tried(IMAGE, bytes(32)), "another base is another matter"
    while not worth.is_tried(IMAGE, BASE):
        pass
    worth.tell(IMAGE, BASE, useful=True)
    assert all(worth.is_tried(IMAGE, BASE) for _ in range(100))


def test_of_so_many_pairs_it_is_known_and_no_more() -> None:
    worth = Worth()
    for number in range(1000):
        for _ in range(USELESS_MAX):
            worth.tell(IMAGE, number.to_bytes(32, "big"), useful=False)
    assert not worth.is_tried(IMAGE, (999).to_bytes(32, "big"))
    assert worth.is_tried(IMAGE, bytes(32)), "forgotten, and tried anew"
