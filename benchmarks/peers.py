"""Libraries that a user would take instead, where they are installed.

    .venv/bin/pip install --no-deps -r requirements/peers.txt

One process holds memory, another reads all of it, as often as it is told; nothing is verified there.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_S, READ_S, END_S = 60.0, 120.0, 20.0
POLL_S = 0.0005
Side = Callable[[Connection, int], None]


class NoPeer(Exception):
    """It does not run here; the text says why."""


class Peer:
    """A holder, and a reader of what it holds. Raises NoPeer.

    Both are there for a turn only: memory that lies idle for others' turns is taken away by some virtual machines.
    """

    def __init__(self, context: Any, module: str, hold: Side, read: Side, size: int) -> None:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise NoPeer(f"{module} is not installed (requirements/peers.txt)")
        self._context, self._module, self._sides, self._size = context, module, (hold, read), size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def seconds(self) -> float:
        """Of the second read of all: with the first the two meet."""
        try:
            for side in self._sides:
                here, there = self._context.Pipe()
                process = self._context.Process(target=side, args=(there, self._size), daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
            self._pipes[1].send(self._hear(0, START_S))
            took = 0.0
            for _ in range(2):
                self._pipes[1].send(True)
                took = float(self._hear(1, READ_S))
            return took
        except (EOFError, OSError):
            raise NoPeer(f"{self._module} does not run here: its process ended") from None
        finally:
            self.close()

    def _hear(self, side: int, deadline_s: float) -> Any:
        if not self._pipes[side].poll(deadline_s):
            raise NoPeer(f"{self._module} did nothing for {deadline_s:g} s")
        return self._pipes[side].recv()

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(END_S)
        self._pipes, self._processes = [], []


def hold_nixl(pipe: Connection, size: int) -> None:
    """NIXL over its UCX backend on TCP."""
    import torch

    agent = _nixl("holder")
    data = torch.ones(size, dtype=torch.uint8)
    held = agent.register_memory(data)
    pipe.send((agent.get_agent_metadata(), agent.get_serialized_descs(held.trim())))
    pipe.recv()


def read_nixl(pipe: Connection, size: int) -> None:
    import torch

    agent = _nixl("reader")
    data = torch.zeros(size, dtype=torch.uint8)
    here = agent.register_memory(data).trim()
    metadata, there = pipe.recv()
    name = agent.add_remote_agent(metadata)
    peer = name.decode() if isinstance(name, bytes) else name
    there = agent.deserialize_descs(there)
    while pipe.recv():
        data.zero_()
        handle = agent.initialize_xfer("READ", here, there, peer, b"read")
        begun = time.perf_counter()
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            time.sleep(POLL_S)
            state = agent.check_xfer_state(handle)
        took = time.perf_counter() - begun
        assert state == "DONE"
        assert bool(data.all()), "not all of it came"
        agent.release_xfer_handle(handle)
        pipe.send(took)


def _nixl(name: str) -> Any:
    os.environ.update(UCX_TLS="tcp,self", NIXL_LOG_LEVEL="ERROR")
    api: Any = importlib.import_module("nixl._api")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))


def hold_mooncake(pipe: Connection, size: int) -> None:
    """Mooncake's transfer engine over TCP."""
    import numpy as np

    engine, data = _mooncake(), np.ones(size, np.uint8)
    assert engine.register_memory(data.ctypes.data, size) == 0
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", data.ctypes.data))
    pipe.recv()


def read_mooncake(pipe: Connection, size: int) -> None:
    import numpy as np

    engine, data = _mooncake(), np.zeros(size, np.uint8)
    assert engine.register_memory(data.ctypes.data, size) == 0
    peer, there = pipe.recv()
    while pipe.recv():
        data[:] = 0
        begun = time.perf_counter()
        answer = engine.transfer_sync_read(peer, data.ctypes.data, there, size)
        took = time.perf_counter() - begun
        assert answer == 0
        assert bool(data.all()), "not all of it came"
        pipe.send(took)


def _mooncake() -> Any:
    module: Any = importlib.import_module("mooncake.engine")
    engine = module.TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return engine


SIDES: dict[str, tuple[str, Side, Side]] = {
    "nixl": ("nixl._api", hold_nixl, read_nixl),
    "mooncake": ("mooncake.engine", hold_mooncake, read_mooncake),
}
