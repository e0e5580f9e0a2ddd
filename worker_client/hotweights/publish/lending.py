"""A live module's tensors, copied within GPU memory and lent to this node's engines while they update.

    state (GPU) --copy, device to device--> memory of our own --handles--> agent --> ranks copy what they need
                                            freed when all have, or when the lease is over

The trainer may change its tensors as soon as the copy is made. Engines take from it what they write whole; everything
is proven against the published image all the same. Other nodes, and engines that cannot reach the GPU, take the image.
"""

import asyncio
import atexit
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hotweights.transports import cuda_ipc
from hotweights.transports.errors import TransportError
from hotweights.v1 import agent_service_pb2 as pb
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.agent_client import connect_or_start
from hotweights.worker_client.config import Config
from hotweights.worker_client.image.headers import TensorSpan, read_header
from hotweights.worker_client.image.layout import Layout

log = logging.getLogger(__name__)

LEASE_S_MAX = 3600.0
START_DEADLINE_S = 60.0
END_DEADLINE_S = 10.0
POLL_S = 0.1


class DeviceCopy:
    """Of those tensors of a state dict that lie on GPUs, as the file that was written of it holds them."""

    def __init__(self, state: Mapping[str, Any], weights: Path) -> None:
        """Raises TransportError: no driver, or not as much memory."""
        spans = [span for span in read_header(weights).tensors if span.size_bytes and _is_on_gpu(state.get(span.name))]
        self._memories: list[tuple[cuda_ipc.Lent, pb.DeviceMemory]] = []
        try:
            for ordinal in sorted({_ordinal(state[span.name]) for span in spans}):
                here = [span for span in spans if _ordinal(state[span.name]) == ordinal]
                self._memories.append(_copied(ordinal, here, state, weights.name))
        except BaseException:
            self.close()
            raise

    @property
    def memories(self) -> list[pb.DeviceMemory]:
        """What borrowers need to know. Empty when nothing lies on a GPU."""
        return [told for _, told in self._memories]

    def close(self) -> None:
        """Frees it all. Again does nothing."""
        for memory, _ in self._memories:
            memory.close()
        self._memories.clear()


def _copied(
    ordinal: int, spans: list[TensorSpan], state: Mapping[str, Any], file: str
) -> tuple[cuda_ipc.Lent, pb.DeviceMemory]:
    uuids = {at: name for name, at in cuda_ipc.devices().items()}
    layout = Layout(uuids[ordinal])
    places = [layout.add(file, span.offset, span.size_bytes) for span in spans]
    memory = cuda_ipc.Lent(ordinal, layout.size_bytes)
    try:
        memory.write(0, layout.told.seal)
        cuda_ipc.synchronize(ordinal)  # whatever streams they are written on
        for span, place in zip(spans, places, strict=True):
            tensor = state[span.name].detach()
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                cuda_ipc.synchronize(ordinal)
            if tensor.nbytes != span.size_bytes:
                raise TransportError(f"{span.name} has {tensor.nbytes} bytes, {span.size_bytes} in the file")
            memory.copy(place, tensor.data_ptr(), span.size_bytes)
            if tensor.data_ptr() != state[span.name].data_ptr():  # it goes
                cuda_ipc.synchronize(ordinal)
        cuda_ipc.synchronize(ordinal)
    except BaseException:
        memory.close()
        raise
    layout.told.handle = memory.handle
    return memory, layout.told


def _is_on_gpu(tensor: Any) -> bool:
    return bool(getattr(tensor, "is_cuda", False))


def _ordinal(tensor: Any) -> int:
    return int(tensor.device.index)


class Loan:
    """A copy that is lent until all who borrowed it have returned it, or its lease is over. Has a thread of its own."""

    def __init__(self, copy: DeviceCopy, digest: bytes, config: Config, lease_s: float) -> None:
        """The copy is closed with it."""
        self._copy, self._digest, self._config = copy, digest, config
        self._ends_at = time.monotonic() + lease_s
        self._begun, self._end = threading.Event(), threading.Event()
        self._problem = ""
        self.borrowers = 0
        """Engines that read it, or are about to."""
        self._thread = threading.Thread(target=self._run, name="hotweights-loan", daemon=True)

    def start(self) -> None:
        """Returns once engines can borrow it, or it is known that they cannot; that is logged then."""
        try:
            self._thread.start()
        except BaseException:
            self._copy.close()
            raise
        atexit.register(self.end)
        if not self._begun.wait(START_DEADLINE_S):
            self._problem = "the agent does not answer"
            self.end()
        if self._problem:
            log.warning("GPU memory is not lent, engines take the image from host memory: %s", self._problem)

    @property
    def is_over(self) -> bool:
        """Whether its memory is freed."""
        return not self._thread.is_alive()

    def wait(self, deadline_s: float) -> bool:
        """Whether it is over by then."""
        self._thread.join(deadline_s)
        return self.is_over

    def end(self) -> None:
        """Frees the memory now, whoever reads it."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join(END_DEADLINE_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._lend())
        except (HotweightsError, OSError) as error:
            self._problem = str(error)
            if self._begun.is_set():
                log.warning("the agent no longer lends GPU memory of this process: %s", error)
                if self.borrowers:  # they were told of the lease, and may read on
                    self._end.wait(max(0.0, self._ends_at - time.monotonic()))
        finally:
            self._copy.close()
            self._begun.set()
            atexit.unregister(self.end)

    async def _lend(self) -> None:
        lending = asyncio.ensure_future(self._until_over())
        while not (lending.done() or self._end.is_set() or time.monotonic() > self._ends_at):
            await asyncio.wait({lending}, timeout=POLL_S)
        if not lending.done():
            lending.cancel()
        with suppress(asyncio.CancelledError):
            await lending

    async def _until_over(self) -> None:
        agent = await connect_or_start(self._config)
        try:
            left_s = self._ends_at - time.monotonic()
            async for borrowers in agent.lend_image(self._digest, self._copy.memories, left_s):
                self.borrowers = borrowers
                self._begun.set()
        finally:
            await agent.close()


_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
_loans: dict[str, Loan] = {}


def lend_module(
    state: Mapping[str, Any], weights: Path, digest: bytes, *, model: str, config: Config, lease_s: float
) -> Loan | None:
    """Lends what of `state` lies on GPUs; `weights` is the file that was written of it, `digest` its image's.

    A process lends one version of a model at a time: the one before is freed, unless engines borrow it; then, and
    where there is no memory for a copy, nothing is lent, which is logged. None then, and when nothing is on a GPU.
    """
    with _locks[model]:
        before = _loans.get(model)
        if before is not None and not before.is_over:
            if before.borrowers:
                log.warning("GPU memory is not lent: engines still read that of the version before")
                return None
            before.end()
        try:
            copy = DeviceCopy(state, weights)
        except (TransportError, RuntimeError) as error:  # torch has no narrower name for what CUDA refuses
            log.warning("GPU memory is not lent, engines take the image from host memory: %s", error)
            return None
        if not copy.memories:
            return None
        loan = _loans[model] = Loan(copy, digest, config, lease_s)
        loan.start()
    return loan
