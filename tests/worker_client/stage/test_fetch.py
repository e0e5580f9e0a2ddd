"""Fetching from other nodes: every byte proven, and whoever fails is passed over."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.worker_client.stage.checkpoints import BUCKET_BYTES, contents, make_image, touch_bytes
from tests.worker_client.stage.test_base import next_version, stage_whole

from hotweights.transports import base
from hotweights.transports.base import Connection, Place, Reads, Server, ThreadConnection
from hotweights.transports.errors import NotHeld, NotYet, PeerGone
from hotweights.transports.pace import Pace
from hotweights.transports.shared import SharedTransport
from hotweights.transports.tcp import TcpTransport
from hotweights.transports.tcp_server import Limits
from hotweights.transports.threads import Stop
from hotweights.v1.worker_service_pb2 import Source
from hotweights.worker_client.image.delta import make_delta
from hotweights.worker_client.image.digests import PieceHasher
from hotweights.worker_client.image.manifest import Image
from hotweights.worker_client.image.reader import BucketReader
from hotweights.worker_client.stage import fetch
from hotweights.worker_client.stage.buckets import BucketVerifier
from hotweights.worker_client.stage.errors import SourcesFailed
from hotweights.worker_client.stage.fetch import Fetch, Open, Tally
from hotweights.worker_client.stage.partial import Partial
from hotweights.worker_client.stage.stage import Stage


@dataclass
class Node:
    """A source with faults to order. Keys of `wrong_times` are (file, offset).

    Where `there` is given it is staging the image itself, and has so many buckets from the first.
    """

    image: Image
    wrong_times: Counter[tuple[int, int]] = field(default_factory=Counter)
    holds: bool = True
    asked: Counter[tuple[int, int]] = field(default_factory=Counter)
    server: Server | None = None
    there: int | None = None
    place: Place | None = None
    more: asyncio.Event = field(default_factory=asyncio.Event)
    bases: dict[bytes, Image] = field(default_factory=dict)

    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> memoryview | None:
        return None

    def open(self, image: bytes, file: int, offset: int, size: int) -> memoryview:
        self.asked[file, offset] += 1
        if not self.holds or image != self.image.digest:
            raise NotHeld(image, file, offset, size)
        buckets = self.image.manifest.buckets
        index = next(at for at, bucket in enumerate(buckets) if (bucket.file, bucket.offset) == (file, offset))
        if self.there is not None and index >= self.there:
            raise NotYet(image, sum(bucket.size_bytes for bucket in buckets[: self.there]))
        data = bytearray(BucketReader().read_range(self.image, file, offset, size))
        if self.wrong_times[file, offset] > 0:
            self.wrong_times[file, offset] -= 1
            data[len(data) // 2] ^= 1
        return memoryview(data)

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> bytes | None:
        return None

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        if base not in self.bases:
            return None
        return make_delta(view, BucketReader().read_range(self.bases[base], file, offset, view.nbytes))

    def locate(self, image: bytes, file: int) -> Place | None:
        return self.place if file == 1 else None

    async def until_more(self, image: bytes) -> None:
        await self.more.wait()

    def come(self, there: int) -> None:
        self.there = there
        self.more.set()
        self.more = asyncio.Event()

    async def serve(self) -> None:
        self.server = await TcpTransport().serve(self, "127.0.0.1:0", check=lambda token, image: token == b"good")


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "v1")


@pytest.fixture
async def nodes(image: Image) -> AsyncIterator[list[Node]]:
    nodes = [Node(image), Node(image)]
    for node in nodes:
        await node.serve()
    yield nodes
    for node in nodes:
        if node.server is not None:
            await node.server.close()


def sources(nodes: list[Node], token: bytes = b"good") -> list[Source]:
    return [
        Source(
            node_id=f"node-{number}",
            data_endpoint=node.server.address,
            token=token,
            staging=node.there is not None or not node.holds,
        )
        for number, node in enumerate(nodes)
        if node.server is not None
    ]


async def connect(source: Source) -> Connection:
    return await TcpTransport().connect(source.data_endpoint, token=source.token, deadline_s=5)


class OnLoop:
    """A connection that is not read from in threads."""

    way, origin = "tcp", ""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.doubt, self.close = connection.doubt, connection.close

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        return await self._connection.read_into(image, file, offset, into, deadline_s=deadline_s, base=base)


async def connect_on_loop(source: Source) -> Connection:
    return OnLoop(await connect(source))


both_ways = pytest.mark.parametrize("open_source", [connect, connect_on_loop], ids=["in threads", "on the loop"])


def before_verifying(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """`first` is called in the thread in which it is found out whether a bucket is right."""
    monkeypatch.setattr(fetch, "HASHED_HERE_BYTES", 0)
    matches, confirms = Partial.matches, BucketVerifier.confirms

    def matches_then(self: Partial, index: int) -> bool:
        first()
        return matches(self, index)

    def confirms_then(self: BucketVerifier, index: int, hasher: PieceHasher) -> bool:
        first()
        return confirms(self, index, hasher)

    monkeypatch.setattr(Partial, "matches", matches_then)
    monkeypatch.setattr(BucketVerifier, "confirms", confirms_then)


def no_progress(bytes_done: int, bytes_total: int) -> None: ...


@pytest.fixture
def partial(image: Image, tmp_path: Path) -> Partial:
    stage = Stage(tmp_path / "stage")
    stage.open()
    return stage.reserve(image.digest, image.blob)[0]


async def test_every_bucket_is_asked_once_from_the_preferred_source(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    told: list[tuple[int, int]] = []
    tally = Tally()
    await Fetch(partial, sources(nodes), connect, lambda done, total: told.append((done, total)), tally=tally).run()
    assert (tally.source, tally.left) == ("node-0", [])
    assert tally.bytes_per_s > 0
    assert contents(partial.folder) == contents(image.folder)
    assert set(nodes[0].asked.values()) == {1}
    assert sum(nodes[0].asked.values()) == len(image.manifest.buckets)
    assert not nodes[1].asked
    assert told[-1] == (image.size_bytes, image.size_bytes)


async def test_a_bucket_that_came_wrong_is_fetched_again(image: Image, nodes: list[Node], partial: Partial) -> None:
    nodes[0].wrong_times[1, 0] = 1
    await Fetch(partial, sources(nodes), connect, no_progress).run()
    assert contents(partial.folder) == contents(image.folder)
    assert nodes[0].asked[1, 0] + nodes[1].asked[1, 0] == 2


async def test_a_bucket_that_a_source_has_wrong_comes_from_another(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    nodes[0].wrong_times[1, 0] = 1000
    await Fetch(partial, sources(nodes), connect, no_progress).run()
    assert contents(partial.folder) == contents(image.folder)
    assert nodes[0].asked[1, 0] <= fetch.WRONG_MAX
    assert nodes[1].asked[1, 0] == 1


async def test_a_bucket_that_is_wrong_everywhere_fails_and_says_so(nodes: list[Node], partial: Partial) -> None:
    for node in nodes:
        node.wrong_times[1, 0] = 1000
    with pytest.raises(SourcesFailed, match=r"node-0.*wrong bytes.*node-1.*wrong bytes"):
        await Fetch(partial, sources(nodes), connect, no_progress).run()
    assert partial.missing


async def test_a_source_that_is_away_is_passed_over(image: Image, nodes: list[Node], partial: Partial) -> None:
    wanted = sources(nodes)
    assert nodes[0].server is not None
    await nodes[0].server.close()
    await Fetch(partial, wanted, connect, no_progress).run()
    assert contents(partial.folder) == contents(image.folder)
    assert sum(nodes[1].asked.values()) == len(image.manifest.buckets)


async def test_a_source_without_the_image_or_that_refuses_the_token_is_not_asked_again_and_again(
    nodes: list[Node], partial: Partial
) -> None:
    wanted = sources(nodes[:1])
    nodes[0].holds = False
    wanted = [*wanted, *sources(nodes, token=b"bad")[1:]]
    with pytest.raises(SourcesFailed, match=r"node-0.*not held.*node-1.*token"):
        await Fetch(partial, wanted, connect, no_progress).run()
    assert sum(nodes[0].asked.values()) <= fetch.PARALLEL
    assert not nodes[1].asked


async def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


@both_ways
async def test_the_next_bucket_is_received_while_the_one_before_is_verified(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch, open_source: Open
) -> None:
    asked_while_verifying: list[int] = []

    def wait() -> None:
        ends = time.monotonic() + 5
        while not asked_while_verifying and sum(nodes[0].asked.values()) < 2 and time.monotonic() < ends:
            time.sleep(0.005)
        asked_while_verifying.append(sum(nodes[0].asked.values()))

    before_verifying(monkeypatch, wait)
    await Fetch(partial, sources(nodes[:1]), open_source, no_progress, parallel=1).run()
    assert contents(partial.folder) == contents(image.folder)
    assert asked_while_verifying[0] == 2
    assert sum(nodes[0].asked.values()) == len(image.manifest.buckets)


class Spoiling:
    """A connection on which every bucket is altered."""

    way, origin = "tcp", ""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read_into(
        self, image: bytes, file: int, offset: int, into: memoryview, *, deadline_s: float, base: bytes | None = None
    ) -> int:
        got = await self._connection.read_into(image, file, offset, into, deadline_s=deadline_s, base=base)
        into[0] ^= 1
        return got

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        return False

    async def close(self) -> None:
        await self._connection.close()


async def test_one_connection_that_breaks_what_it_carries_makes_no_liar_of_its_source(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the bucket after the first wrong one, over the same connection, turns out to be wrong too."""
    monkeypatch.setattr(fetch, "HASHED_HERE_BYTES", 0)
    monkeypatch.setattr(fetch, "REST_S", 0.0)
    real = Partial.matches

    def slow(self: Partial, index: int) -> bool:
        time.sleep(0.02)
        return real(self, index)

    monkeypatch.setattr(Partial, "matches", slow)
    opened = 0

    async def open_source(source: Source) -> Connection:
        nonlocal opened
        opened += 1
        connection = await connect(source)
        return Spoiling(connection) if opened == 1 else connection

    tally = Tally()
    await Fetch(partial, sources(nodes[:1]), open_source, no_progress, parallel=1, tally=tally).run()
    assert contents(partial.folder) == contents(image.folder)
    assert opened == 2
    assert not tally.left


async def test_a_bucket_that_has_no_room_yet_is_not_asked_for(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    with_room, there = asyncio.Event(), 2

    async def room(index: int) -> None:
        if index >= there:
            await with_room.wait()

    running = asyncio.ensure_future(Fetch(partial, sources(nodes[:1]), connect, no_progress, room=room).run())
    await until(lambda: len(partial.missing) == len(image.manifest.buckets) - there)
    await asyncio.sleep(0.1)
    assert sum(nodes[0].asked.values()) == there
    with_room.set()
    await asyncio.wait_for(running, 10)
    assert contents(partial.folder) == contents(image.folder)


class Gate:
    """Holds every thread that verifies until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.open = threading.Event(), threading.Event()
        before_verifying(monkeypatch, self._hold)

    def _hold(self) -> None:
        self.inside.set()
        assert self.open.wait(10)


@both_ways
async def test_called_off_ever_so_often_it_ends_when_no_thread_is_at_it_any_more(
    nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch, open_source: Open
) -> None:
    gate = Gate(monkeypatch)
    running = asyncio.ensure_future(Fetch(partial, sources(nodes), open_source, no_progress, parallel=1).run())
    await until(gate.inside.is_set)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0.05)
    assert not running.done()
    gate.open.set()
    await asyncio.wait({running}, timeout=10)
    assert running.cancelled()


@both_ways
async def test_failed_and_then_called_off_it_waits_for_its_threads_too(
    nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch, open_source: Open
) -> None:
    gate = Gate(monkeypatch)

    async def room(index: int) -> None:
        if index > 0:
            await until(gate.inside.is_set)
            raise OSError("no room")

    running = asyncio.ensure_future(Fetch(partial, sources(nodes), open_source, no_progress, room=room).run())
    await until(gate.inside.is_set)
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.sleep(0.1)
    assert not running.done()
    gate.open.set()
    await asyncio.wait({running}, timeout=10)
    assert running.done()


@both_ways
async def test_what_came_right_counts_though_nobody_has_the_rest(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch, open_source: Open
) -> None:
    real_open = Node.open

    def only_one(self: Node, digest: bytes, file: int, offset: int, size: int) -> memoryview:
        if self.asked:
            raise NotHeld(digest, file, offset, size)
        return real_open(self, digest, file, offset, size)

    before_verifying(monkeypatch, lambda: time.sleep(0.2))
    monkeypatch.setattr(Node, "open", only_one)
    with pytest.raises(SourcesFailed):
        await Fetch(partial, sources(nodes[:1]), open_source, no_progress, parallel=1).run()
    assert len(partial.missing) == len(image.manifest.buckets) - 1


async def test_a_last_bucket_that_is_wrong_is_asked_for_again(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    last = image.manifest.buckets[-1]
    nodes[0].wrong_times[last.file, last.offset] = 1
    await Fetch(partial, sources(nodes[:1]), connect, no_progress, parallel=1).run()
    assert contents(partial.folder) == contents(image.folder)
    assert nodes[0].asked[last.file, last.offset] == 2


async def test_a_source_that_is_getting_the_image_is_waited_for_while_more_of_it_comes(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    nodes[0].there = 0
    fetching = asyncio.ensure_future(Fetch(partial, sources(nodes), connect, no_progress).run())
    for there in range(1, len(image.manifest.buckets) + 1):
        await asyncio.sleep(0.02)
        nodes[0].come(there)
    await asyncio.wait_for(fetching, 10)
    assert contents(partial.folder) == contents(image.folder)
    assert not nodes[1].asked  # who has all of it is left in peace


async def test_a_source_that_has_not_begun_is_waited_for(image: Image, nodes: list[Node], partial: Partial) -> None:
    nodes[0].holds = False
    fetching = asyncio.ensure_future(Fetch(partial, sources(nodes), connect, no_progress).run())
    await asyncio.sleep(0.3)
    assert not fetching.done()
    nodes[0].holds = True
    await asyncio.wait_for(fetching, 10)
    assert not nodes[1].asked


async def test_a_source_that_gets_no_more_is_left_for_the_next(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALL_S", 0.2)
    monkeypatch.setattr(base, "WAIT_S", 0.05)
    nodes[0].there = 3
    tally = Tally()
    await asyncio.wait_for(Fetch(partial, sources(nodes), connect, no_progress, tally=tally).run(), 10)
    assert [(left.source_node_id, left.lied) for left in tally.left][:1] == [("node-0", False)]
    assert tally.left[0].reason == "has got nothing of the image for 0.2 s"
    assert contents(partial.folder) == contents(image.folder)
    assert {at for at, count in nodes[1].asked.items() if count} == {
        (bucket.file, bucket.offset) for bucket in image.manifest.buckets[3:]
    }


async def test_a_source_that_sends_wrong_bytes_is_left_for_good(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "REST_S", 0.0)
    for bucket in image.manifest.buckets:
        nodes[0].wrong_times[bucket.file, bucket.offset] = 1000
    tally = Tally()
    await Fetch(partial, sources(nodes), connect, no_progress, tally=tally).run()
    assert contents(partial.folder) == contents(image.folder)
    assert sum(nodes[0].asked.values()) <= 2 * fetch.WRONG_MAX + fetch.PARALLEL
    assert {(left.source_node_id, left.lied) for left in tally.left} == {("node-0", True)}
    assert "wrong bytes" in tally.left[0].reason


async def test_a_source_that_only_says_a_little_more_each_time_is_left(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers at once, and never has the bucket."""
    monkeypatch.setattr(fetch, "STALL_S", 0.2)

    class Talker:
        way, origin, said = "talk", "", 0

        async def read_into(self, *_: object, **__: object) -> int:
            Talker.said += 1
            raise NotYet(image.digest, Talker.said)

        def doubt(self, image: bytes, file: int, origin: str) -> bool:
            return False

        async def close(self) -> None: ...

    async def open_source(source: Source) -> Connection:
        return Talker() if source.node_id == "talker" else await connect(source)

    wanted = [Source(node_id="talker", staging=True), *sources(nodes)]
    tally = Tally()
    await asyncio.wait_for(Fetch(partial, wanted, open_source, no_progress, tally=tally).run(), 10)
    assert contents(partial.folder) == contents(image.folder)
    assert Talker.said < 100
    assert tally.left[0].source_node_id == "talker"


async def test_a_source_that_never_begins_is_passed_over_and_is_nobodys_failure(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALL_S", 0.2)
    nodes[0].holds = False
    tally = Tally()
    await asyncio.wait_for(Fetch(partial, sources(nodes), connect, no_progress, tally=tally).run(), 10)
    assert contents(partial.folder) == contents(image.folder)
    assert tally.left == []


async def test_a_source_whose_agent_was_started_again_begins_anew(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    wanted = sources(nodes[:1], token=b"old")
    wanted[0].staging = False

    async def open_source(source: Source) -> Connection:
        if source.token == b"old":
            wanted[0] = Source(node_id="node-0", data_endpoint=source.data_endpoint, token=b"good")
        return await connect(source)

    with pytest.raises(SourcesFailed):
        await Fetch(partial, sources(nodes[:1], token=b"old"), connect, no_progress).run()
    await asyncio.wait_for(Fetch(partial, wanted, open_source, no_progress).run(), 10)
    assert contents(partial.folder) == contents(image.folder)


async def test_a_limit_that_a_bucket_takes_long_for_does_not_cost_the_connection(
    image: Image, partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources keep no connection open for who asks nothing."""
    monkeypatch.setattr(fetch, "LINGER_S", 0.05)
    node = Node(image)
    server = await TcpTransport(Limits(hello_s=0.1, idle_s=0.1)).serve(
        node, "127.0.0.1:0", check=lambda token, image: True
    )
    source = Source(node_id="node", data_endpoint=server.address, token=b"good")
    pace = Pace(400_000)  # a bucket in 0.16 s
    await asyncio.wait_for(Fetch(partial, [source], connect, no_progress, pace=pace).run(), 20)
    assert contents(partial.folder) == contents(image.folder)
    await server.close()


async def test_no_source_at_all_is_an_error(partial: Partial) -> None:
    with pytest.raises(SourcesFailed):
        await Fetch(partial, [], connect, no_progress).run()


async def test_a_source_that_is_always_away_is_given_up_in_time(
    partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "REST_S", 0.01)
    attempts = 0

    async def refuse(source: Source) -> Connection:
        nonlocal attempts
        attempts += 1
        raise PeerGone(source.data_endpoint, "nobody there")

    with pytest.raises(SourcesFailed, match="nobody there"):
        await asyncio.wait_for(Fetch(partial, [Source(node_id="n")], refuse, no_progress).run(), 5)
    assert attempts <= fetch.FAILURES_MAX + fetch.PARALLEL


async def test_a_source_that_joins_later_is_used(image: Image, nodes: list[Node], partial: Partial) -> None:
    nodes[0].wrong_times[1, 0] = 1000
    wanted = sources(nodes[:1])

    def join(bytes_done: int, bytes_total: int) -> None:
        if len(wanted) == 1:
            wanted.append(sources(nodes)[1])

    await Fetch(partial, wanted, connect, join).run()
    assert contents(partial.folder) == contents(image.folder)


async def test_cancelled_in_the_middle_it_writes_no_more(partial: Partial, nodes: list[Node]) -> None:
    running: list[asyncio.Future[None]] = []

    def cancel(bytes_done: int, bytes_total: int) -> None:
        running[0].cancel()

    running.append(asyncio.ensure_future(Fetch(partial, sources(nodes), connect, cancel, parallel=2).run()))
    await asyncio.wait(running, timeout=10)
    assert running[0].cancelled()
    assert partial.missing
    before = contents(partial.folder)
    await asyncio.sleep(0.3)
    assert contents(partial.folder) == before


async def test_wrong_bytes_in_a_folder_that_both_see_are_no_fault_of_the_source(
    image: Image, nodes: list[Node], partial: Partial, tmp_path: Path
) -> None:
    stale = tmp_path / "shared" / "stale"
    stale.parent.mkdir()
    stale.write_bytes(bytes(image.manifest.files[1].size_bytes))
    nodes[0].place = Place(str(stale), stale.stat().st_size, stale.stat().st_mtime_ns)
    transport, tally = SharedTransport(TcpTransport(), [stale.parent]), Tally()

    async def open_source(source: Source) -> Connection:
        return await transport.connect(source.data_endpoint, token=source.token, deadline_s=5)

    await Fetch(partial, sources(nodes[:1]), open_source, no_progress, parallel=2, tally=tally).run()
    assert contents(partial.folder) == contents(image.folder)
    assert not tally.left
    assert sum(nodes[0].asked.values()) == len(image.manifest.buckets)


# Deltas.


@pytest.fixture
def step(image: Image, tmp_path: Path) -> Image:
    """A version with a little changed in every weight file."""
    return next_version(tmp_path / "v2", image, (1, 100), (2, 100))


async def fetch_step(
    step: Image,
    before: Image,
    nodes: list[Node],
    root: Path,
    *,
    altered: bool = False,
    pace: Pace | None = None,
    parallel: int = 8,
) -> tuple[Partial, Tally, list[bytes]]:
    """Over deltas to `before`, which is staged here; and the deltas that were right."""
    stage = Stage(root)
    stage.open()
    stage_whole(stage, before)
    for file in before.manifest.files if altered else ():
        for offset in range(5000, file.size_bytes, BUCKET_BYTES):
            touch_bytes(root / before.digest.hex() / file.name, offset)
    partial, (base,) = stage.reserve(step.digest, step.blob)[0], stage.base_of(step.manifest)
    tally, right = Tally(), list[bytes]()
    fetching = Fetch(partial, sources(nodes), connect, no_progress, parallel=parallel, pace=pace, tally=tally)
    fetching.ask_deltas(base, lambda image, base, bucket, delta: right.append(delta))
    await fetching.run()
    base.close()
    assert contents(partial.folder) == contents(step.folder)
    return partial, tally, right


async def test_what_changed_is_all_that_comes_over_the_wire(
    image: Image, step: Image, nodes: list[Node], tmp_path: Path
) -> None:
    for node in nodes:
        node.image, node.bases = step, {image.digest: image}
    _, tally, right = await fetch_step(step, image, nodes, tmp_path / "stage")
    assert len(right) == len(step.manifest.buckets)
    assert tally.wire_bytes < step.size_bytes / 100
    assert not tally.left


async def test_from_a_source_without_the_base_plain_buckets_come(
    image: Image, step: Image, nodes: list[Node], tmp_path: Path
) -> None:
    for node in nodes:
        node.image = step
    _, tally, right = await fetch_step(step, image, nodes, tmp_path / "stage")
    assert (tally.wire_bytes, right) == (step.size_bytes, [])


async def test_deltas_that_do_not_fit_are_asked_of_that_source_no_more_and_it_is_no_liar(
    image: Image, step: Image, nodes: list[Node], tmp_path: Path
) -> None:
    another = make_image(tmp_path / "another", seed=9)
    for node in nodes:
        node.image, node.bases = step, {image.digest: another}
    nodes[0].bases = {image.digest: next_version(tmp_path / "off", step, (1, 70_000), (2, 70_000))}
    _, tally, _ = await fetch_step(step, image, nodes, tmp_path / "stage", parallel=1)
    assert not tally.left
    assert sum(nodes[0].asked.values()) == len(step.manifest.buckets) + 1  # the first of two is asked again, as it is
    assert not nodes[1].asked


async def test_a_base_of_our_own_that_was_altered_costs_no_source_and_brings_nothing_wrong(
    image: Image, step: Image, nodes: list[Node], tmp_path: Path
) -> None:
    for node in nodes:
        node.image, node.bases = step, {image.digest: image}
    _, tally, _ = await fetch_step(step, image, nodes, tmp_path / "stage", altered=True)
    assert not tally.left
    assert tally.wire_bytes > BUCKET_BYTES


async def test_a_limit_of_bandwidth_counts_what_came_as_a_delta(
    image: Image, step: Image, nodes: list[Node], tmp_path: Path
) -> None:
    for node in nodes:
        node.image, node.bases = step, {image.digest: image}
    pace = Pace(step.size_bytes / 100)  # as plain buckets it would take 100 s
    await asyncio.wait_for(fetch_step(step, image, nodes, tmp_path / "stage", pace=pace), 20)


@dataclass(eq=False)
class Threaded:
    """A connection that is read from in threads, with faults to order by the number of a wish."""

    connection: Connection
    gone_at_ask: int = -1
    gone_at_take: int = -1
    altered: set[int] = field(default_factory=set)
    way: str = "tcp"
    origin: str = ""
    asked: int = 0
    taken: int = 0
    runs: int = 0

    async def in_thread(self, work: Callable[[Reads, Stop], object]) -> bool:
        assert isinstance(self.connection, ThreadConnection)
        self.runs += 1
        return await self.connection.in_thread(lambda reads, stop: work(Faulty(self, reads), stop))

    async def read_into(self, *_: object, **__: object) -> int:
        raise AssertionError("it reads in threads")

    def doubt(self, image: bytes, file: int, origin: str) -> bool:
        return False

    async def close(self) -> None:
        await self.connection.close()


@dataclass
class Faulty:
    of: Threaded
    reads: Reads

    def ask(self, image: bytes, file: int, offset: int, size: int, base: bytes | None = None) -> None:
        self.of.asked += 1
        if self.of.asked == self.of.gone_at_ask:
            raise PeerGone("node-0", "ended the connection")
        self.reads.ask(image, file, offset, size, base)

    def take(self, into: memoryview, *, deadline_s: float, came: Callable[[memoryview], object] | None = None) -> int:
        self.of.taken += 1
        if self.of.taken == self.of.gone_at_take:
            raise PeerGone("node-0", "ended the connection")

        def spoil(part: memoryview) -> None:
            if self.of.taken in self.of.altered:
                part[0] ^= 1
            if came is not None:
                came(part)

        return self.reads.take(into, deadline_s=deadline_s, came=spoil)


@pytest.mark.parametrize(
    "faults",
    [
        {"gone_at_ask": 1},
        {"gone_at_ask": 3},
        {"gone_at_take": 1},
        {"gone_at_take": 3},
        {"altered": {2}},
        {"altered": {2}, "gone_at_take": 3},
        {"altered": {2}, "gone_at_ask": 3},
        {"altered": {2, 3}},
    ],
    ids=str,
)
async def test_what_a_thread_does_not_bring_is_brought_by_the_next(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any]
) -> None:
    monkeypatch.setattr(fetch, "REST_S", 0.0)
    opened: list[Threaded] = []

    async def open_source(source: Source) -> Connection:
        opened.append(Threaded(await connect(source), **({} if opened else faults)))
        return opened[-1]

    told: list[int] = []
    tally = Tally()
    fetching = Fetch(
        *(partial, sources(nodes[:1]), open_source, lambda done, total: told.append(done)), parallel=1, tally=tally
    )
    await asyncio.wait_for(fetching.run(), 10)
    assert contents(partial.folder) == contents(image.folder)
    assert len(opened) == 2
    assert told == sorted(set(told))
    assert told[-1] == tally.wire_bytes == image.size_bytes
    assert not tally.left


async def test_a_thread_brings_bucket_after_bucket_and_none_before_there_is_room(
    image: Image, nodes: list[Node], partial: Partial
) -> None:
    opened: list[Threaded] = []

    async def open_source(source: Source) -> Connection:
        opened.append(Threaded(await connect(source)))
        return opened[-1]

    with_room = asyncio.Event()

    async def room(index: int) -> None:
        await with_room.wait()

    running = asyncio.ensure_future(
        Fetch(partial, sources(nodes[:1]), open_source, no_progress, room=room, parallel=1).run()
    )
    await asyncio.sleep(0.1)
    assert not opened
    with_room.set()
    await asyncio.wait_for(running, 10)
    assert opened[0].runs == len(image.manifest.buckets)  # each waited for its room on the loop

    missing = len(image.manifest.buckets)
    partial.missing = set(range(missing))
    opened.clear()
    await Fetch(partial, sources(nodes[:1]), open_source, no_progress, parallel=1).run()
    assert opened[0].runs == 1
    assert opened[0].asked == missing


async def test_a_limit_of_the_rate_is_kept_on_the_loop(image: Image, nodes: list[Node], partial: Partial) -> None:
    opened: list[Threaded] = []

    async def open_source(source: Source) -> Connection:
        opened.append(Threaded(await connect(source)))
        return opened[-1]

    fetching = Fetch(partial, sources(nodes[:1]), open_source, no_progress, pace=Pace(1e9))
    with pytest.raises(AssertionError, match="reads in threads"):
        await fetching.run()
    assert not sum(connection.runs for connection in opened)


async def test_progress_never_goes_back_though_two_threads_tell_of_it(
    image: Image, nodes: list[Node], partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    mark_good = Partial.mark_good

    def slow(self: Partial, index: int) -> None:
        mark_good(self, index)
        time.sleep(0.02 if index % 2 else 0.0)  # between what is marked and what is told of it

    monkeypatch.setattr(Partial, "mark_good", slow)
    await Fetch(partial, sources(nodes[:1]), connect, lambda done, total: told.append(done), parallel=2).run()
    assert told == sorted(set(told))
    assert told[-1] == image.size_bytes
