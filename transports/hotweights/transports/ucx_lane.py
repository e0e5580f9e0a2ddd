"""UCX in this process: one worker that all connections share, through ucxx, or ucx-py where only that is installed.

Both libraries keep one worker a process and settle their requests on the event loop that made it: a Lane is made once
and used from one event loop.
"""

import asyncio
import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hotweights.transports.errors import TransportMissing

MODULES = ("ucxx", "ucp")
# UCX's own (8 KiB to send) makes two system calls for each: half again as fast here, at half the processor time.
SEGMENTS = {"TCP_TX_SEG_SIZE": "256k", "TCP_RX_SEG_SIZE": "256k"}
# Above that nothing is sent before somebody receives it: it would wait in UCX's own memory.
RENDEZVOUS = {"RNDV_THRESH": "65536"}
ABORT_NS = 10**8
END_S = 1.0
_DEVICES = (Path("/sys/class/infiniband"), Path("/sys/class/cxi"))  # EFA is among the first
# By UCX's names of its transports: these need no processor to move bytes.
_RDMA = ("rc_", "dc_", "ud_", "cxi", "efa", "gga")


class Endpoint:
    """A way to the worker of another process. What is under way when it ends is called off."""

    def __init__(self, endpoint: Any, module: Any) -> None:
        self._endpoint = endpoint
        self._failed = _errors(module)
        self._limit = {"period": ABORT_NS} if module.__name__ == "ucxx" else {}  # ucx-py waits for nothing
        self._pending: set[asyncio.Future[Any]] = set()

    async def send(self, part: memoryview, tag: int) -> None:
        """All of `part`, to who receives that tag. Raises OSError."""
        await self._settle(self._endpoint.send(part, tag=tag, force_tag=True))

    async def receive(self, into: bytearray, size: int, tag: int) -> None:
        """Fills the first `size` bytes. Called off, it may still write to `into`. Raises OSError."""
        await self._settle(self._endpoint.recv(memoryview(into)[:size], tag=tag, force_tag=True))

    async def _settle(self, request: Any) -> None:
        """The library's request goes on when we are called off: it holds the memory until it has ended."""
        pending = asyncio.ensure_future(request)
        self._pending.add(pending)
        pending.add_done_callback(self._ended)
        try:
            await asyncio.shield(pending)
        except self._failed as error:
            raise OSError(f"UCX: {error}") from error

    def _ended(self, pending: "asyncio.Future[Any]") -> None:
        self._pending.discard(pending)
        if not pending.cancelled():
            pending.exception()

    async def close(self) -> None:
        """Returns when nothing is under way any more, or after END_S."""
        with suppress(*self._failed):
            self._endpoint.abort(**self._limit)
        if self._pending:
            await asyncio.wait(set(self._pending), timeout=END_S)


class Lane:
    """See the module. `address` is what the other side makes an endpoint of."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.address = bytes(memoryview(module.get_worker_address()))

    async def endpoint(self, address: bytes) -> Endpoint:
        """To the worker of that address. Raises OSError."""
        try:
            there = self._module.get_ucx_address_from_buffer(address)
            made = await self._module.create_endpoint_from_worker_address(there)
        except _errors(self._module, ValueError) as error:
            raise OSError(f"UCX: {error}") from error
        return Endpoint(made, self._module)

    def close(self) -> None:
        """Nobody may use it any more."""
        if hasattr(self._module, "stop_notifier_thread"):
            self._module.stop_notifier_thread()

    def finds_rdma(self) -> bool:
        """Whether UCX uses a device that moves bytes by itself."""
        return any(name in self._module.get_ucp_context_info() for name in _RDMA)


def has_rdma() -> bool:
    """Whether the machine has such a device, as its kernel shows it; nothing is loaded for that."""
    return any(folder.is_dir() and any(folder.iterdir()) for folder in _DEVICES)


def _errors(module: Any, *more: type[Exception]) -> tuple[type[Exception], ...]:
    """What all errors of the library are, and `more`."""
    names = ("UCXError", "UCXBaseException")
    return (*more, *(found for name in names if (found := getattr(module.exceptions, name, None)) is not None))


_lane: Lane | None = None


def close_lane() -> None:
    """At the end of the process, where there is one: a thread of ucxx's would keep it."""
    if _lane is not None:
        _lane.close()


def open_lane(settings: Mapping[str, str]) -> Lane:
    """The process's one. `settings` are UCX's, without UCX_: "TLS", "NET_DEVICES"; they go before the environment.

    Raises TransportMissing.
    """
    global _lane
    if _lane is None:
        _lane = Lane(_initialised(settings))
    return _lane


def _initialised(settings: Mapping[str, str]) -> Any:
    # ucxx itself sets a variable that UCX does not know and warns of, to stdout.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # noqa: TID251  it is UCX's, which asks nothing else
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        ours = {key: value for key, value in {**SEGMENTS, **RENDEZVOUS}.items() if f"UCX_{key}" not in os.environ}  # noqa: TID251
        # Else ucxx asks a waiting request again and again, on the event loop.
        futures = {"enable_python_future": True} if name == "ucxx" else {}
        try:
            module.init(options={**ours, **settings}, **futures)
        except _errors(module, RuntimeError) as error:
            raise TransportMissing("ucx", reason=f"UCX does not start: {error}", known=("tcp",)) from error
        return module
    raise TransportMissing("ucx", "ucx", reason="needs ucxx, which is not installed")
