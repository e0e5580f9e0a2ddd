"""An image from one node to one other over loopback, verified, into the stage: against a plain socket and other movers.

    python -m benchmarks.transfer --json [--quick]

    tcp_rate      ours over tcp, every bucket verified in the stage, over a plain socket's `recv_into` of as many bytes
    tcp_huge_rate likewise, of nodes whose stages are on a tmpfs with huge pages (benchmarks.memory)
    ucx_rate      ours over UCX with nothing but TCP, likewise; shm_rate: where it may take shared memory too
    gloo_rate     a broadcast of torch.distributed over gloo, which verifies nothing, over the same
    nixl_rate     a READ of NIXL over its UCX backend on TCP, likewise; mooncake_rate: of Mooncake's engine over TCP
    line_share    ours over a link of 1 Gbit/s between two network namespaces, of what the link carries

    gloo_verified, nixl_verified, mooncake_verified   theirs and then the hashes of all of it, on all cores, likewise

Sender and receiver are processes of their own; the receiver's memory is under /dev/shm, or on that tmpfs, and allocated
before the clock starts. All take their turn in every run. What is not in this version or not installed is under
`skipped`.
"""

import argparse
import asyncio
import importlib.util
import mmap
import multiprocessing as mp
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import netns
from benchmarks.fanout import Fleet, make_image
from benchmarks.memory import NoHugePages, huge_pages
from benchmarks.peers import SIDES, NoPeer, Peer
from benchmarks.report import Report, progress

MIB = 1 << 20
IMAGE_MIB, IMAGE_MIB_QUICK = 2048, 256
RUNS, RUNS_QUICK = 7, 3
LINE_MBIT, LINE_MIB = 1000.0, 512
SEND_BYTES = 4 << 20
HUGE_MORE_BYTES = 64 * MIB
# Of 1514 bytes on the wire 1448 are ours.
PAYLOAD = 1448 / 1514
PEERS = ("gloo", *SIDES)  # which verify nothing
# tbf lets a burst of 256 KiB pass.
LINE_SHARE_MAX = 1.01
Receive = Callable[[str, Path], float]


def memory_of(file: Path) -> memoryview:
    """The file, mapped and read once."""
    handle = os.open(file, os.O_RDONLY)
    try:
        mapped = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
    finally:
        os.close(handle)
    mapped.madvise(mmap.MADV_WILLNEED)
    return memoryview(mapped)


def touch(memory: memoryview) -> None:
    """Every page of it is there afterwards."""
    import numpy as np

    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 0


def send_plain(pipe: Connection, folder: Path) -> None:
    """As much as there is, to everyone who connects."""
    data = memory_of(folder / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(f"127.0.0.1:{server.getsockname()[1]}")
        while True:
            reader, _ = server.accept()
            with reader:
                reader.sendall(data)


def receive_plain(address: str, folder: Path) -> float:
    """Seconds for all of it, into memory that is there."""
    size = (folder / "model.safetensors").stat().st_size
    into = memoryview(mmap.mmap(-1, size))
    touch(into)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        begun, at = time.perf_counter(), 0
        while at < size:
            at += sock.recv_into(into[at:])
        return time.perf_counter() - begun


class Staged:
    """A source of a folder's files, in the order of their names, as an agent gives those of its stage."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.iterdir())

    def at_hand(self, image: bytes, file: int, offset: int, size: int) -> Any:
        from hotweights.transports.base import FileRange

        return FileRange(os.open(self._files[file], os.O_RDONLY | os.O_CLOEXEC), offset, size)

    def open(self, image: bytes, file: int, offset: int, size: int) -> Any:
        return self.at_hand(image, file, offset, size)

    def delta_at_hand(self, image: bytes, base: bytes, file: int, offset: int, size: int) -> None: ...

    def delta(self, image: bytes, base: bytes, file: int, offset: int, view: memoryview) -> bytes | None:
        return None

    def locate(self, image: bytes, file: int) -> None: ...

    async def until_more(self, image: bytes) -> None: ...


def transport_of(ucx: str) -> Any:
    """Ours over UCX with these of its transports; over tcp where there are none."""
    from hotweights.transports.registry import open_transport

    return open_transport("ucx", ucx={"TLS": ucx}) if ucx else open_transport("tcp")


def send_ours(pipe: Connection, folder: Path, ucx: str = "") -> None:
    """As an agent does."""

    async def serve() -> None:
        server = await transport_of(ucx).serve(Staged(folder), "127.0.0.1:0", check=lambda token, image: True)
        pipe.send(server.address)
        await asyncio.Event().wait()

    asyncio.run(serve())


def receive_ours(address: str, folder: Path, ucx: str = "") -> float:
    """In a process of its own: UCX stays as it was set at first."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(receive_into_stage, (address, folder, ucx))


def receive_into_stage(address: str, folder: Path, ucx: str) -> float:
    """Seconds until the image is whole and verified in the stage, the room for it being there."""
    from hotweights.transports.base import Connection as Way
    from hotweights.v1.worker_service_pb2 import Source
    from hotweights.worker_client.image import build_manifest
    from hotweights.worker_client.stage.fetch import Fetch
    from hotweights.worker_client.stage.stage import Stage

    async def connect(source: Source) -> Way:
        way: Way = await transport_of(ucx).connect(address, token=b"-", deadline_s=10)
        return way

    image = build_manifest(folder)
    root = Path(tempfile.mkdtemp(prefix="received-", dir=folder.parent))
    try:
        stage = Stage(root / "stage")
        stage.open()
        coming, _ = stage.reserve(image.digest, image.blob)
        for index in range(len(image.manifest.buckets)):  # mapped pages too
            with coming.view(index) as place:
                touch(place)
        begun = time.perf_counter()
        asyncio.run(Fetch(coming, [Source(node_id="source")], connect, lambda done, total: None).run())
        took = time.perf_counter() - begun
        stage.finish(coming)
        stage.close()
        return took
    finally:
        shutil.rmtree(root)


def gloo(rank: int, port: int, size: int, runs: int, pipe: Connection) -> None:
    """Broadcasts, one whenever the other side is told to."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    while pipe.recv():
        data = torch.ones(size, dtype=torch.uint8)
        dist.barrier()
        begun = time.perf_counter()
        dist.broadcast(data, 0)
        pipe.send(time.perf_counter() - begun)
        del data
    dist.destroy_process_group()


class Pair:
    """A sender and, run by run, its receiver."""

    def __init__(self, context: Any, send: Callable[[Connection, Path], None], receive: Receive, folder: Path) -> None:
        here, there = context.Pipe()
        self._process = context.Process(target=send, args=(there, folder), daemon=True)
        self._process.start()
        self._address: str = here.recv()
        self._receive, self._folder = receive, folder

    def seconds(self) -> float:
        return self._receive(self._address, self._folder)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


class Hash:
    """What a peer's user has to do beside, to know what came: the digests of all of it, on all cores."""

    def __init__(self, folder: Path) -> None:
        from hotweights.worker_client.image import build_manifest

        self._folder, self._manifest = folder, build_manifest(folder).manifest

    def seconds(self) -> float:
        from hotweights.worker_client.image.verify import verify_folder

        begun = time.perf_counter()
        verify_folder(self._folder, self._manifest)
        return time.perf_counter() - begun

    def close(self) -> None: ...


class Gloo:
    """Two processes of one group."""

    def __init__(self, context: Any, size: int, runs: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes = [context.Pipe() for _ in range(2)]
        self._processes = [
            context.Process(target=gloo, args=(rank, port, size, runs, pipe[1]), daemon=True)
            for rank, pipe in enumerate(self._pipes)
        ]
        for process in self._processes:
            process.start()

    def seconds(self) -> float:
        for here, _ in self._pipes:
            here.send(True)
        return max(float(here.recv()) for here, _ in self._pipes)

    def close(self) -> None:
        for here, _ in self._pipes:
            here.send(False)
        for process in self._processes:
            process.join(20)


def line_share(work: Path, stages: Path, size: int, runs: int) -> list[float]:
    """Of a link of LINE_MBIT, by update after update between two nodes. Raises NoNamespaces."""
    with netns.nodes(2, LINE_MBIT) as nodes, Fleet(work, stages, nodes).running("hotweights.cli") as fleet:
        taken = [asyncio.run(fleet.time_of(1, size))[0] for _ in range(runs)]
    best = size * 8 / (LINE_MBIT * 1e6 * PAYLOAD)
    for run, took in enumerate(taken):
        progress(f"line run {run}: {took:.2f} s, {best:.2f} s at the line's own rate")
    shares = [best / took for took in taken]
    if max(shares) > LINE_SHARE_MAX:
        raise SystemExit(f"transfer: {max(shares):.2f} of the line came over it: that is no measurement of this link")
    return shares


def skip_peer(report: Report, name: str, reason: str) -> None:
    report.skip(f"{name}_rate", reason)
    report.skip(f"{name}_verified", reason)


def on_huge_pages(stack: ExitStack, report: Report, context: Any, folder: Path, size: int) -> dict[str, Pair]:
    """Ours with a copy of the image there, where there are any."""
    try:
        large = stack.enter_context(huge_pages(2 * size + HUGE_MORE_BYTES))
    except NoHugePages as error:
        report.skip("tcp_huge_rate", str(error))
        return {}
    return {"tcp_huge": Pair(context, send_ours, receive_ours, Path(shutil.copytree(folder, large / "image")))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help=f"{IMAGE_MIB_QUICK} MiB, {RUNS_QUICK} runs")
    arguments = parser.parse_args()
    runs, size = (RUNS_QUICK, IMAGE_MIB_QUICK * MIB) if arguments.quick else (RUNS, IMAGE_MIB * MIB)
    report, context = Report("transfer", runs), mp.get_context("spawn")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotweights-bench-", dir="/dev/shm")))
        folder = make_image(work / "image", size)
        movers: dict[str, Pair | Gloo | Peer | Hash] = {
            "hash": Hash(folder),
            "plain": Pair(context, send_plain, receive_plain, folder),
            "tcp": Pair(context, send_ours, receive_ours, folder),
        }
        movers |= on_huge_pages(stack, report, context, folder, size)
        for name, ucx in (("ucx", "tcp,self"), ("shm", "tcp,sm,self")):
            if importlib.util.find_spec("ucxx") is None:
                report.skip(f"{name}_rate", "ucxx is not installed")
            else:
                movers[name] = Pair(context, partial(send_ours, ucx=ucx), partial(receive_ours, ucx=ucx), folder)
        if importlib.util.find_spec("torch") is None:
            skip_peer(report, "gloo", "torch is not installed")
        else:
            movers["gloo"] = Gloo(context, size, runs)
        for name, (module, hold, read) in SIDES.items():
            try:
                peer = Peer(context, module, hold, read, size)
                peer.seconds()
                movers[name] = peer
            except NoPeer as error:
                skip_peer(report, name, str(error))
        taken: dict[str, list[float]] = {name: [] for name in movers}
        for run in range(-1, runs):
            try:
                seconds = {name: mover.seconds() for name, mover in movers.items()}
            except NoPeer as error:
                raise SystemExit(f"transfer: {error}, and it did before: nothing is reported") from None
            progress(
                f"run {run}: " + ", ".join(f"{name} {size / took / 1e9:.2f} GB/s" for name, took in seconds.items())
            )
            for name, took in seconds.items() if run >= 0 else ():
                taken[name].append(took)
        for mover in movers.values():
            mover.close()
        shutil.rmtree(folder)
        for name, values in taken.items():
            report.median(name, [size / took / 1e9 for took in values], "GB/s")
            if name not in ("plain", "hash"):
                report.ratio(f"{name}_rate", taken["plain"], values)
            if name in PEERS:
                both = [took + verified for took, verified in zip(values, taken["hash"], strict=True)]
                report.ratio(f"{name}_verified", taken["plain"], both)
        try:
            shares = line_share(work, work / "stages", LINE_MIB * MIB // (8 if arguments.quick else 1), min(runs, 3))
            report.median("line_share", shares, "of the line")
            report.ratios["line_share"] = float(report.medians["line_share"]["value"])
        except netns.NoNamespaces as error:
            report.skip("line_share", str(error))
    report.emit(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
