"""The one stream that an agent or a replica keeps to the coordinator.

    member --- Hello, Heartbeat, Answer, Report --->  coordinator
           <-- Welcome, Order ----------------------

It reconnects until closed. What is true of the member is said anew in every Hello, so a report
lost with a stream is not lost for good; reports that wait for a connection are bounded.
"""

import asyncio
import logging
import random
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1 import worker_service_pb2_grpc as rpc
from hotweights.wire.access import ANONYMOUS, Access, BadAccess
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import Refused
from hotweights.wire.problems import call_error

log = logging.getLogger(__name__)

REPORTS_MAX = 256
ANSWERED_MAX = 1024
WELCOME_DEADLINE_S = 10.0
RETRY_S_MIN, RETRY_S_MAX = 0.2, 5.0

OnOrder = Callable[[pb.Order], Awaitable[str]]
OnWelcome = Callable[[pb.Welcome], None]


class Session:
    """Keeps the stream up. Use from one event loop only."""

    def __init__(
        self,
        endpoint: Endpoint,
        make_hello: Callable[[], pb.Hello],
        on_order: OnOrder,
        *,
        on_welcome: OnWelcome | None = None,
        on_refused: Callable[[Refused], None] | None = None,
        adopt_cluster: bool = False,
        access: Access = ANONYMOUS,
    ) -> None:
        """`make_hello` says who and what is true now; the session fills in incarnation and cluster.

        `on_order` returns "" to take an order or the reason to refuse it; it must return quickly
        and leave the work to a task. Once a cluster is known, another one is followed only with
        `adopt_cluster`: epochs of two clusters do not compare. What `access` names is read for every stream anew.
        """
        self._adopt_cluster = adopt_cluster
        self._endpoint = endpoint
        self._access = access
        self._make_hello = make_hello
        self._on_order = on_order
        self._on_welcome = on_welcome
        self._on_refused = on_refused
        self._incarnation = str(uuid.uuid4())
        self._outbox: deque[pb.SessionRequest] = deque(maxlen=REPORTS_MAX)
        self._wakes = asyncio.Event()
        self._stream: object | None = None
        self._closed = False
        self._answered: dict[tuple[int, int], str] = {}
        self._task: asyncio.Task[None] | None = None
        self.cluster_id = ""
        self.epoch = 0
        self.revision = 0
        self.welcome: pb.Welcome | None = None
        self.refusal = ""

    @property
    def connected(self) -> bool:
        """Whether a Welcome is in force."""
        return self.welcome is not None

    def report(self, report: pb.Report) -> None:
        """Queues a report; progress replaces older progress of the same order."""
        if report.WhichOneof("event") == "stage_progress":
            for waiting in list(self._outbox):
                old = waiting.report
                if old.WhichOneof("event") == "stage_progress" and old.number == report.number:
                    self._outbox.remove(waiting)
        self._say(pb.SessionRequest(report=report))

    def refresh(self) -> None:
        """Drops the stream so that a new Hello says what is true now."""
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Connects and reconnects until `close`."""
        delay = RETRY_S_MIN
        while not self._closed:
            self._task = asyncio.ensure_future(self._one_stream())
            await asyncio.wait({self._task})
            was_welcome, self.welcome = self.welcome is not None, None
            if not self._task.cancelled() and (error := self._task.exception()) is not None:
                self._stream_failed(error)
            delay = RETRY_S_MIN if was_welcome else min(delay * 2, RETRY_S_MAX)
            if not self._closed:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def close(self) -> None:
        """Ends the stream and `run`."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=2.0)

    def _stream_failed(self, error: BaseException) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            mapped = call_error(error, self._endpoint, self._access)
            if isinstance(mapped, Refused):
                self._was_refused(mapped, "the coordinator refuses the session")
            else:
                log.info("session: %s; connecting again", mapped)
        elif isinstance(error, BadAccess):  # files that are being replaced, or that somebody must see to
            self._was_refused(error, "no session")
        elif isinstance(error, TimeoutError | asyncio.TimeoutError):
            log.info("session: no welcome from %s in time; connecting again", self._endpoint)
        else:
            raise error

    def _was_refused(self, refused: Refused, what: str) -> None:
        if self.refusal != refused.message:
            log.warning("%s: %s", what, refused.message)
        self.refusal = refused.message
        if self._on_refused is not None:
            self._on_refused(refused)

    def _say(self, message: pb.SessionRequest) -> None:
        self._outbox.append(message)
        self._wakes.set()

    async def _one_stream(self) -> None:
        channel = open_channel(self._endpoint, self._access)
        stream = self._stream = object()
        try:
            stub = rpc.WorkerServiceStub(channel)
            call = stub.Session(self._requests(stream))
            first = await asyncio.wait_for(call.read(), WELCOME_DEADLINE_S)
            if first is grpc.aio.EOF or first.WhichOneof("message") != "welcome":
                await call.code()
                return
            if not self._welcomed(first.welcome):
                return
            while (message := await call.read()) is not grpc.aio.EOF:
                await self._ordered(message.order)
        finally:
            # gRPC leaves the requests of a call that ended waiting: they would take the next stream's reports.
            self._stream = None
            self._wakes.set()
            self._forget_answers()
            await channel.close()

    def _forget_answers(self) -> None:
        """An answer names its order by number only: on another stream it would be taken for a newer one's."""
        for waiting in [message for message in self._outbox if message.HasField("answer")]:
            self._outbox.remove(waiting)

    def _welcomed(self, welcome: pb.Welcome) -> bool:
        if welcome.cluster_id != self.cluster_id:
            # Epochs compare only within a cluster; another store is another history.
            if self.cluster_id and not self._adopt_cluster:
                self._refuse_cluster(welcome.cluster_id)
                return False
            self.cluster_id, self.epoch = welcome.cluster_id, 0
            self._answered.clear()
        self.epoch = max(self.epoch, welcome.epoch)
        self.revision = welcome.revision
        self.welcome = welcome
        self.refusal = ""
        self._wakes.set()
        if self._on_welcome is not None:
            self._on_welcome(welcome)
        return True

    def _refuse_cluster(self, other: str) -> None:
        refusal = (
            f"the coordinator at {self._endpoint} is of cluster {other}, not {self.cluster_id}: its "
            "store was replaced; restart this process, or set HOTWEIGHTS_ADOPT_CLUSTER=1"
        )
        if self.refusal != refusal:
            log.warning("%s", refusal)
        self.refusal = refusal

    async def _ordered(self, order: pb.Order) -> None:
        key = (order.epoch, order.number)
        if order.epoch < self.epoch:
            refusal = f"epoch {order.epoch} is over; {self.epoch} leads"
        elif key in self._answered:
            refusal = self._answered[key]
        else:
            self.epoch = order.epoch
            refusal = await self._on_order(order)
            self._answered[key] = refusal
            while len(self._answered) > ANSWERED_MAX:
                self._answered.pop(next(iter(self._answered)))
        self.revision = max(self.revision, order.revision)
        answer = pb.Answer(
            number=order.number, nonce=order.nonce, refusal=refusal, update_id=order.update_id, epoch=order.epoch
        )
        self._say(pb.SessionRequest(answer=answer))

    async def _requests(self, stream: object) -> AsyncIterator[pb.SessionRequest]:
        hello = self._make_hello()
        hello.incarnation = self._incarnation
        # Whoever follows any cluster claims to know none: the coordinator refuses members of another.
        hello.cluster_id = "" if self._adopt_cluster else self.cluster_id
        hello.last_epoch = self.epoch
        hello.last_revision = self.revision
        yield pb.SessionRequest(hello=hello)
        while self._stream is stream:
            if self._outbox and self.connected:
                message = self._outbox[0]
                yield message
                # Written by now, unless the stream is gone: then it waits for the next one.
                if self._stream is stream and self._outbox and self._outbox[0] is message:
                    self._outbox.popleft()
                continue
            self._wakes.clear()
            beat = self.welcome.heartbeat_s if self.welcome is not None else WELCOME_DEADLINE_S
            try:
                await asyncio.wait_for(self._wakes.wait(), beat)
            except asyncio.TimeoutError:
                yield pb.SessionRequest(heartbeat=pb.Heartbeat(last_revision=self.revision))
