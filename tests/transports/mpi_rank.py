"""One rank of an MPI job: `mpirun -n 3 python -m tests.transports.mpi_rank WHAT FOLDER`.

Rank 0 is the source, or 1 where "leader hangs"; the others read all of its file in buckets. Each prints a JSON object
about itself.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.transports.sources import IMAGE, MIB, TOKEN, Held, accept_good_token, pattern

from hotweights.transports import mpi, mpi_lane
from hotweights.transports.mpi import MpiTransport

BUCKET = MIB // 4
CONTENT = pattern(8 * MIB + 77)
DEADLINE_S = 60.0
BASE = b"b" * 32


async def main(what: str, folder: Path) -> dict[str, Any]:
    lane = await asyncio.to_thread(mpi_lane.open_lane)
    if what == "large":
        vars(mpi)["KEPT_BYTES_MAX"] = BUCKET - 1
    me, others = lane.rank, range(1, lane.size)
    address = folder / "address"
    done = [folder / f"done-{rank}" for rank in others]
    told: dict[str, Any] = {"rank": me, "size": lane.size}
    the_source = 1 if what == "leader hangs" else 0
    done = [file for file in done if what != "leader hangs" or file.name == "done-2"]
    if what == "leader hangs" and me == 0:
        (folder / "stops").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        await until(lambda: all(file.exists() for file in done))
    elif me == the_source:
        source = Held(CONTENT, deltas={BASE: b"a delta"})
        server = await MpiTransport(lane).serve(source, "127.0.0.1:0", check=accept_good_token)
        address.with_suffix(".new").write_text(server.address)
        address.with_suffix(".new").rename(address)
        if what == "over":
            lane.close()
        await until(lambda: all(file.exists() for file in done))
        if what == "leader hangs":
            told |= {"waiting": len(lane._mine), "ways": [], "whole": True}
            os.kill(int((folder / "pid-0").read_text()), signal.SIGCONT)
        await server.close()
    else:
        await until(address.exists)
        if what == "late" and me == 2:
            await until(done[0].exists)
        if what == "over":
            await until(lambda: bool(lane.trouble))
        if what == "hangs" and me == 2:
            (folder / "stops").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif "hangs" in what:
            await until((folder / "stops").exists)
            await asyncio.sleep(0.5)
        told |= await fetch(lane, address.read_text(), 4 if what == "at once" else 1)
        (folder / f"done-{me}").touch()
        if what == "hangs" and me == 1:
            os.kill(int((folder / "pid-2").read_text()), signal.SIGCONT)
        await until(lambda: all(file.exists() for file in done))
    return {**told, "casts": lane.casts, "kept": len(lane._kept)}


async def fetch(lane: mpi_lane.MpiLane, address: str, parallel: int) -> dict[str, Any]:
    into, ways = bytearray(len(CONTENT)), set[str]()
    todo = list(range(0, len(CONTENT), BUCKET))

    async def work() -> None:
        connection = await MpiTransport(lane).connect(address, token=TOKEN, deadline_s=10)
        while todo:
            at = todo.pop(0)
            part = memoryview(into)[at : at + BUCKET]
            assert await connection.read_into(IMAGE, 0, at, part, deadline_s=DEADLINE_S) == len(part)
            ways.add(connection.way)
            assert connection.doubt(IMAGE, 0, connection.origin) == (
                connection.way == "mpi"
            )  # another rank than the source may have sent it
        delta = bytearray(BUCKET)
        assert await connection.read_into(IMAGE, 0, 0, memoryview(delta), deadline_s=10, base=BASE) == len(b"a delta")
        await connection.close()

    await asyncio.gather(*(work() for _ in range(parallel)))
    return {"whole": into == CONTENT, "ways": sorted(ways)}


async def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < ends, "too late"
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    home = Path(sys.argv[2])
    (home / f"pid-{os.environ['OMPI_COMM_WORLD_RANK']}").write_text(str(os.getpid()))
    answer = asyncio.run(main(sys.argv[1], home))
    mpi_lane.close_lane()
    print(json.dumps(answer), flush=True)
