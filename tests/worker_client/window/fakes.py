"""An engine, an agent and a session stream in memory: for tests of the window and the controller, not of them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1.agent_service_pb2 import BorrowImageResponse
from hotweights.wire.errors import Refused
from hotweights.worker_client.window.engine import EngineFacts, EngineFailed, PauseMode, Process, Status


class FakeEngine:
    """Ranks that hold a folder's name for weights. `does` overrides what a call answers."""

    def __init__(self, ranks: int = 2, folder: str = "/base") -> None:
        self.facts = EngineFacts("fake 1", folder, ranks)
        self.weights = [folder] * ranks
        self.kept: list[str] | None = None
        self.prepared = ""
        self.paused = False
        self.tag = ""
        self.calls: list[str] = []
        self.killed = ""
        self.ended: tuple[Process, ...] = ()
        self.device = "cpu"
        self.lent: dict[str, Any] = {}
        self.condemned = ""
        self.asleep = 0
        self.owner_paused = False
        self.salt = ""
        self.reading = False
        self.wakes = asyncio.Event()
        self.checks_finite = False
        self.cleared_caches = self.caches_spoilt = False
        self.expects = self.anew = False
        self.base = self.retained = ""
        self.does: dict[str, Callable[..., Awaitable[Any]]] = {}

    def proof(self, rank: int) -> bytes:
        return f"{rank}:{self.weights[rank]}".encode()

    def expected(self, rank: int) -> bytes:
        return f"{rank}:{self.prepared}".encode()

    async def _done(self, name: str, *args: Any) -> Any:
        assert not self.killed, f"{name} on an engine that was killed"
        self.calls.append(name)
        if name in self.does:
            return await self.does[name](*args)
        return None

    async def pause(self, mode: PauseMode) -> None:
        await self._done("pause", mode)
        self.paused = True

    async def resume(self, salt: str) -> bool:
        await self._done("resume")
        self.paused, self.salt = False, salt or self.salt
        return not self.owner_paused

    async def cores(self) -> list[Process]:
        return [Process(99, 1)]

    async def read(self, begin: bool) -> int:
        assert not self.killed
        self.reading = begin and not self.asleep
        return self.asleep

    async def await_wake(self) -> None:
        await self._done("await_wake")
        await self.wakes.wait()

    def wake(self) -> None:
        self.asleep = 0
        self.wakes.set()

    async def let_wake(self) -> None:
        await self._done("let_wake")

    async def rpc(self, method: str, *args: Any) -> list[Status]:
        name = method.removeprefix("hotweights_")
        overridden = await self._done(name, *args)
        if overridden is not None:
            answers: list[Status] = overridden
            return answers
        call, *rest = args
        return [
            {"call": call, "rank": rank, "ok": True, "reason": "", **getattr(self, f"_{name}")(rank, *rest)}
            for rank in range(self.facts.rank_count)
        ]

    def _identify(self, rank: int) -> Status:
        return {"pid": 100 + rank, "started": 1, "device": self.device}

    def _fingerprint(self, rank: int, asked: str = "") -> Status:
        return {"done": True, "fingerprint": self.proof(rank)}

    def _prepare(self, rank: int, folder: str, name_map: dict[str, str], options: dict[str, Any]) -> Status:
        self.checks_finite, self.base, self.anew = options["check_finite"], options["base"], options["anew"]
        self.lent = options["lent"]
        self.prepared, self.kept = folder, None
        return {}

    def _prepared(self, rank: int) -> Status:
        expected = self.expected(rank) if self.expects else b""
        told = {"fingerprint": self.proof(rank), "expected": expected, "caches_spoilt": self.caches_spoilt}
        reasons = [f"layer {rank}: for a reason", "all: packed"]
        sources = [f"cuda-ipc: of GPU-{rank}", "all the same"] if self.lent else []
        of_routes = {"direct": (3, 30), "assembled": (0, 0), "reload": (rank, 7 * rank)}
        routes = {**of_routes, "reasons": reasons, "sources": sources}
        return {"done": True, "routes": routes, **told}

    def _apply(self, rank: int, folder: str) -> Status:
        assert self.paused
        assert folder == self.prepared
        self.kept = self.kept or list(self.weights)
        self.weights[rank] = folder
        return {"written": b"w"}

    def _undo(self, rank: int, options: dict[str, Any]) -> Status:
        assert self.paused
        self.cleared_caches = options["clear_caches"]
        assert self.kept is not None
        self.weights[rank] = self.kept[rank]
        return {}

    def _release(self, rank: int, options: dict[str, Any]) -> Status:
        self.retained = options["retain"]
        self.kept, self.prepared = None, ""
        return {}

    async def set_weight_version(self, version: str) -> None:
        await self._done("tag", version)
        self.tag = version

    async def reset_caches(self) -> bool:
        answer = await self._done("reset")
        return answer is not False

    async def kill(self, processes: Sequence[Process], reason: str) -> None:
        self.killed, self.ended = reason, tuple(processes)

    def condemn(self, reason: str) -> None:
        self.condemned = reason


def refuses(engine: FakeEngine, name: str, reason: str, *, rank: int = 1) -> None:
    """From now on `rank` answers `name` with not ok, after the others did it."""

    async def answer(call: str, *args: Any) -> list[Status]:
        statuses: list[Status] = []
        for index in range(engine.facts.rank_count):
            status: Status = {"call": call, "rank": index, "ok": index != rank, "reason": reason}
            if index != rank:
                status.update(getattr(engine, f"_{name}")(index, *args))
            statuses.append(status)
        return statuses

    engine.does[name] = answer


def hangs(engine: FakeEngine, name: str) -> None:
    async def never(*args: Any) -> None:
        await asyncio.Event().wait()

    engine.does[name] = never


def fails(engine: FakeEngine, name: str, text: str) -> None:
    async def failing(*args: Any) -> None:
        raise EngineFailed(text)

    engine.does[name] = failing


class FakeAgent:
    """Images by digest, each "staged" in a folder of that name; folders identified by theirs."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.mapped: list[bytes] = []
        self.altered_once_mapped: set[bytes] = set()
        self.folders: dict[bytes, Path] = {}
        self.lent: BorrowImageResponse | None = None
        self.borrowed: list[bytes] = []
        self.closed = False

    async def identify_folder(self, folder: Path) -> bytes:
        return folder.name.encode()

    async def map_image(self, digest: bytes, client_id: str) -> Path:
        if digest not in self.held:
            raise OSError(f"image {digest.decode()} is not staged")
        if digest in self.altered_once_mapped and digest in self.mapped:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, "IMAGE_ALTERED", f"image {digest.decode()} was altered")
        if digest not in self.mapped:
            self.mapped.append(digest)
        return self.folders.get(digest, Path("/stage") / digest.decode())

    async def release_image(self, digest: bytes, client_id: str) -> None:
        self.mapped.remove(digest)

    async def borrow_image(self, digest: bytes, client_id: str, *, upload: bool) -> BorrowImageResponse:
        if self.lent is not None and digest not in self.borrowed:
            self.borrowed.append(digest)
        return self.lent or BorrowImageResponse()

    async def return_image(self, digest: bytes, client_id: str) -> None:
        self.borrowed.remove(digest)

    async def close(self) -> None:
        self.closed = True


class FakeStream:
    """The coordinator's end: `give` an order, `take` a report."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[pb.Report] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.hello: Callable[[], pb.Hello] | None = None
        self.on_order: Callable[[pb.Order], Awaitable[str]] | None = None
        self.welcome: Callable[[], None] = lambda: None
        self._number = 0

    def open(self, hello: Any, on_order: Any, welcomed: Any) -> "FakeStream":
        self.hello, self.on_order = hello, on_order
        self.welcome = lambda: welcomed(pb.Welcome(model="m"))
        self.welcome()
        return self

    async def run(self) -> None:
        await self.closed.wait()

    async def close(self) -> None:
        self.closed.set()

    def report(self, report: pb.Report) -> None:
        self.reports.put_nowait(report)

    async def give(self, **action: Any) -> str:
        assert self.on_order is not None
        self._number += 1
        return await self.on_order(pb.Order(number=self._number, epoch=1, update_id="u1", **action))

    async def take(self, deadline_s: float = 60.0) -> pb.Report:
        return await asyncio.wait_for(self.reports.get(), deadline_s)
