"""A member's stream against a fake coordinator: it comes back, loses nothing it need not, and follows one leader."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1 import worker_service_pb2_grpc as rpc
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused, to_metadata
from hotweights.worker_client import session as session_module
from hotweights.worker_client.session import Session

DEADLINE_S = 10.0


@dataclass
class Stream:
    """One stream as the fake coordinator sees it."""

    hello: pb.Hello
    context: Any
    heard: "asyncio.Queue[pb.SessionRequest]" = field(default_factory=asyncio.Queue)
    ends: "asyncio.Future[Refused | None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def welcome(self, cluster: str = "c1", epoch: int = 1, heartbeat_s: float = 60.0) -> None:
        message = pb.Welcome(cluster_id=cluster, epoch=epoch, revision=7, model="m", heartbeat_s=heartbeat_s)
        await self.context.write(pb.SessionResponse(welcome=message))

    async def order(self, number: int, epoch: int = 1, **more: Any) -> None:
        order = pb.Order(number=number, nonce=number + 100, epoch=epoch, end=pb.EndUpdate(), **more)
        await self.context.write(pb.SessionResponse(order=order))

    async def next(self) -> pb.SessionRequest:
        return await asyncio.wait_for(self.heard.get(), DEADLINE_S)

    async def answer(self) -> pb.Answer:
        return (await self.next()).answer

    def end(self, refusal: Refused | None = None) -> None:
        self.ends.set_result(refusal)


class FakeCoordinator(rpc.WorkerServiceServicer):
    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()

    async def Session(self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any) -> None:
        stream = Stream((await anext(request_iterator)).hello, context)
        await self.streams.put(stream)

        async def hear() -> None:
            async for request in request_iterator:
                await stream.heard.put(request)

        hearing = asyncio.ensure_future(hear())
        try:
            refusal = await stream.ends
        finally:
            hearing.cancel()
        if refusal is not None:
            await context.abort(refusal.code, refusal.message, to_metadata(refusal))

    async def stream(self) -> Stream:
        return await asyncio.wait_for(self.streams.get(), DEADLINE_S)

    async def silence(self, seconds: float) -> None:
        """Nobody connects meanwhile."""
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(self.streams.get(), seconds)


@dataclass
class Place:
    fake: FakeCoordinator
    endpoint: Endpoint
    make: Callable[..., Session]
    orders: list[pb.Order] = field(default_factory=list)
    refuses: str = ""


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(session_module, "RETRY_S_MIN", 0.02)
    monkeypatch.setattr(session_module, "RETRY_S_MAX", 0.05)
    fake, server = FakeCoordinator(), grpc.aio.server()
    rpc.add_WorkerServiceServicer_to_server(fake, server)
    endpoint = Endpoint("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    running: list[tuple[Session, asyncio.Future[None]]] = []

    async def on_order(order: pb.Order) -> str:
        here.orders.append(order)
        return here.refuses

    def make(on: Callable[[pb.Order], Awaitable[str]] = on_order, **more: Any) -> Session:
        hello = pb.Hello(replica=pb.ReplicaHello(replica_id="r1"))
        session = Session(endpoint, lambda: hello, on, **more)
        running.append((session, asyncio.ensure_future(session.run())))
        return session

    here = Place(fake, endpoint, make)
    yield here
    for session, task in running:
        await session.close()
        await asyncio.wait({task}, timeout=DEADLINE_S)
        assert task.done()
    await server.stop(0)


def report(number: int, **more: Any) -> pb.Report:
    return pb.Report(number=number, **more)


async def test_it_says_who_it_is_and_what_it_knows(place: Place) -> None:
    session = place.make()
    stream = await place.fake.stream()
    assert (stream.hello.replica.replica_id, stream.hello.cluster_id) == ("r1", "")
    assert len(stream.hello.incarnation) == 36
    assert not session.connected
    await stream.welcome(epoch=3)
    await stream.order(1, epoch=3)
    await stream.answer()
    assert session.connected
    stream.end()
    again = await place.fake.stream()
    assert again.hello.incarnation == stream.hello.incarnation
    assert (again.hello.cluster_id, again.hello.last_epoch, again.hello.last_revision) == ("c1", 3, 7)


async def test_an_order_is_taken_once_and_answered_each_time(place: Place) -> None:
    place.make()
    stream = await place.fake.stream()
    await stream.welcome()
    for _ in range(2):
        await stream.order(5)
        answer = await stream.answer()
        assert (answer.number, answer.nonce, answer.refusal) == (5, 105, "")
    assert [order.number for order in place.orders] == [5]


async def test_a_refusal_travels_with_its_reason(place: Place) -> None:
    place.make()
    place.refuses = "torn"
    stream = await place.fake.stream()
    await stream.welcome()
    await stream.order(5)
    assert (await stream.answer()).refusal == "torn"


async def test_an_order_of_a_lower_epoch_is_refused_and_never_done(place: Place) -> None:
    place.make()
    stream = await place.fake.stream()
    await stream.welcome(epoch=4)
    await stream.order(1, epoch=3)
    assert (await stream.answer()).refusal == "epoch 3 is over; 4 leads"
    # One of a higher epoch is a new leader's, and ends the one before.
    await stream.order(1, epoch=5)
    assert (await stream.answer()).refusal == ""
    await stream.order(2, epoch=4)
    assert "epoch 4 is over" in (await stream.answer()).refusal
    assert [(order.number, order.epoch) for order in place.orders] == [(1, 5)]


async def test_an_older_leader_is_not_obeyed_on_a_new_stream_either(place: Place) -> None:
    place.make()
    first = await place.fake.stream()
    await first.welcome(epoch=9)
    await first.order(1, epoch=9)
    await first.answer()
    first.end()
    second = await place.fake.stream()
    await second.welcome(epoch=8)
    await second.order(1, epoch=8)
    assert "epoch 8 is over; 9 leads" in (await second.answer()).refusal


async def test_another_cluster_is_not_followed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    session = place.make()
    first = await place.fake.stream()
    await first.welcome("c1")
    await first.order(1)
    await first.answer()
    first.end()
    for _ in range(2):
        other = await place.fake.stream()
        await other.welcome("c2", epoch=99)
    await place.fake.stream()
    assert not session.connected
    assert "c2" in session.refusal
    assert "HOTWEIGHTS_ADOPT_CLUSTER" in session.refusal
    assert (session.cluster_id, session.epoch) == ("c1", 1)
    # Said once, not with every attempt.
    assert caplog.text.count("store was replaced") == 1


async def test_another_cluster_is_followed_when_adopting_and_its_epochs_count_anew(place: Place) -> None:
    place.make(adopt_cluster=True)
    first = await place.fake.stream()
    await first.welcome("c1", epoch=50)
    await first.order(1, epoch=50)
    await first.answer()
    first.end()
    second = await place.fake.stream()
    await second.welcome("c2", epoch=1)
    await second.order(1, epoch=1)
    assert (await second.answer()).refusal == ""
    assert [order.epoch for order in place.orders] == [50, 1]


async def test_every_report_reaches_the_stream_that_is_open(place: Place) -> None:
    """The request iterators of streams that ended must not take what is meant for the next."""
    session = place.make()
    for _ in range(5):
        stream = await place.fake.stream()
        await stream.welcome()
        await stream.order(1)
        await stream.answer()
        stream.end()
    stream = await place.fake.stream()
    await stream.welcome()
    for number in range(1, 21):
        session.report(report(number))
        assert (await stream.next()).report.number == number


async def test_reports_made_while_there_is_no_stream_wait_for_one(place: Place) -> None:
    session = place.make()
    stream = await place.fake.stream()
    for number in (1, 2, 3):
        session.report(report(number))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(stream.heard.get(), 0.05)
    await stream.welcome()
    assert [(await stream.next()).report.number for _ in range(3)] == [1, 2, 3]


async def test_reports_that_wait_have_a_bound_and_the_newest_stay(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = place.make()
    stream = await place.fake.stream()
    for number in range(1, session_module.REPORTS_MAX + 11):
        session.report(report(number))
    await stream.welcome()
    assert (await stream.next()).report.number == 11


async def test_newer_progress_of_an_order_takes_the_place_of_older(place: Place) -> None:
    session = place.make()
    stream = await place.fake.stream()
    for done in (1, 2, 3):
        for number in (7, 8):
            session.report(report(number, stage_progress=pb.StageProgress(bytes_done=done)))
    session.report(report(7, staged=pb.Staged()))
    await stream.welcome()
    heard = [(await stream.next()).report for _ in range(3)]
    assert [(item.number, item.stage_progress.bytes_done) for item in heard] == [(7, 3), (8, 3), (7, 0)]
    assert heard[2].WhichOneof("event") == "staged"


async def test_an_answer_does_not_outlive_its_stream(place: Place) -> None:
    """A number of an older epoch may be another order's by now."""
    session = place.make()
    first = await place.fake.stream()
    # No Welcome yet, so nothing is sent; the stream breaks with an answer in the outbox.
    session._say(pb.SessionRequest(answer=pb.Answer(number=2, nonce=102, refusal="no room")))
    first.end()
    second = await place.fake.stream()
    session._outbox.append(pb.SessionRequest(report=report(9)))
    await second.welcome(epoch=2)
    assert (await second.next()).report.number == 9


async def test_it_beats_when_it_has_nothing_else_to_say(place: Place) -> None:
    place.make()
    stream = await place.fake.stream()
    await stream.welcome(heartbeat_s=0.05)
    beats = [(await stream.next()).WhichOneof("message") for _ in range(3)]
    assert beats == ["heartbeat"] * 3


async def test_a_refused_session_says_why_and_tries_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    refusals: list[Refused] = []
    session = place.make(on_refused=refusals.append)
    for _ in range(3):
        stream = await place.fake.stream()
        stream.end(Refused(grpc.StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS", "another live process is r1", member="r1"))
    stream = await place.fake.stream()
    assert session.refusal == "another live process is r1"
    assert {(refusal.reason, refusal.fields["member"]) for refusal in refusals} == {("MEMBER_EXISTS", "r1")}
    assert caplog.text.count("another live process is r1") == 1
    await stream.welcome()
    await stream.order(1)
    await stream.answer()
    assert session.refusal == ""


async def test_no_welcome_in_time_is_another_attempt(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "WELCOME_DEADLINE_S", 0.1)
    session = place.make()
    await place.fake.stream()
    second = await place.fake.stream()
    await second.welcome()
    await second.order(1)
    await second.answer()
    assert session.connected


async def test_a_refresh_says_hello_anew(place: Place) -> None:
    session = place.make()
    first = await place.fake.stream()
    await first.welcome()
    await first.order(1)
    await first.answer()
    session.refresh()
    second = await place.fake.stream()
    assert second.hello.incarnation == first.hello.incarnation


async def test_a_coordinator_that_is_not_there_yet_is_waited_for(place: Place) -> None:
    nowhere = Session(Endpoint("127.0.0.1", 9), lambda: pb.Hello(), lambda order: asyncio.sleep(0, ""))
    task = asyncio.ensure_future(nowhere.run())
    await asyncio.sleep(0.3)
    assert not task.done()
    assert not nowhere.connected
    await nowhere.close()
    await asyncio.wait_for(task, DEADLINE_S)


async def test_closing_ends_the_stream_and_the_run(place: Place) -> None:
    session = place.make()
    stream = await place.fake.stream()
    await stream.welcome()
    await stream.order(1)
    await stream.answer()
    await asyncio.wait_for(session.close(), DEADLINE_S)
    await place.fake.silence(0.2)


async def test_a_bug_in_an_orders_taker_ends_the_run_with_its_error(place: Place) -> None:
    async def bug(order: pb.Order) -> str:
        raise ZeroDivisionError("a bug")

    session = Session(place.endpoint, lambda: pb.Hello(replica=pb.ReplicaHello(replica_id="r1")), bug)
    task = asyncio.ensure_future(session.run())
    stream = await place.fake.stream()
    await stream.welcome()
    await stream.order(1)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(task, DEADLINE_S)
