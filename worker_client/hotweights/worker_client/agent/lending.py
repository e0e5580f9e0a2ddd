"""Copies of images in GPU memory that processes of this node lend to its engines. The agent only introduces them.

    lender --LendImage: handles--> Lending <--BorrowImage-- engine     the engine opens the handle by itself
             ... the call lasts ...        <--ReturnImage-- engine     and says when it has read
           <--ends: all have returned it, or the lease is over--

Several engines borrow the same memory, at different times: once one has, it is kept for those that come a little later.
An engine that ended without returning it is found out by the image, which it no longer maps.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from hotweights.v1 import agent_service_pb2 as pb
from hotweights.wire.errors import Refused

log = logging.getLogger(__name__)

LENT_MAX = 8
LEASE_S_MAX = 3600.0
LATER_S = 5.0
LOOK_S = 5.0
BORROWERS_MAX = 256
MEMORIES_MAX = 64
RANGES_MAX = 1 << 16
HANDLE_BYTES, SEAL_BYTES_MAX, NAME_LENGTH_MAX = 64, 256, 256


@dataclass
class _Loan:
    memories: Sequence[pb.DeviceMemory]
    ends_at: float
    borrowers: set[str] = field(default_factory=set)
    returned_at: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def done_at(self) -> float:
        """When it is over if nobody comes."""
        if self.borrowers or self.returned_at is None:
            return self.ends_at
        return min(self.ends_at, self.returned_at + LATER_S)


class Lending:
    """Of one agent. Use from its event loop."""

    def __init__(self, mapped: Callable[[bytes], list[str]], clock: Callable[[], float] = time.monotonic) -> None:
        """`mapped` gives the clients that map an image; it is called in a thread."""
        self._mapped = mapped
        self._clock = clock
        self._closing = False
        self._loans: dict[bytes, _Loan] = {}

    def lends(self, digest: bytes) -> bool:
        """Whether an image can be borrowed."""
        return digest in self._loans

    async def lend(self, request: pb.LendImageRequest, *, is_wanted: bool = False) -> AsyncIterator[int]:
        """How many borrow it, whenever that changes, until it may be freed. Raises Refused.

        Of what `is_wanted` already, somebody is to borrow it within LATER_S.
        """
        digest, loan = request.manifest_digest, self._loan(request)
        if is_wanted:
            loan.returned_at = self._clock()
        self._loans[digest] = loan
        log.info("image %s is lent in the memory of %s", digest.hex()[:12], _devices(loan))
        try:
            yield 0
            while (left_s := loan.done_at() - self._clock()) > 0:
                if self._closing:
                    raise Refused(grpc.StatusCode.UNAVAILABLE, "AGENT_ENDS", "the agent ends")
                loan.changed.clear()
                try:
                    await asyncio.wait_for(loan.changed.wait(), min(left_s, LOOK_S))
                except asyncio.TimeoutError:
                    for gone in loan.borrowers - set(await asyncio.to_thread(self._mapped, digest)):
                        log.info("%s ended and had not returned what it borrowed", gone)
                        self.give_back(digest, gone)
                    continue
                yield len(loan.borrowers)
        finally:
            if self._loans.get(digest) is loan:
                del self._loans[digest]

    def borrow(self, digest: bytes, client_id: str) -> tuple[Sequence[pb.DeviceMemory], float]:
        """What is lent of an image, and for how many seconds more; nothing where nobody lends it.

        Raises Refused where too many borrow it.
        """
        loan = self._loans.get(digest)
        left_s = 0.0 if loan is None else loan.ends_at - self._clock()
        if loan is None or left_s <= 0:
            return (), 0.0
        if len(loan.borrowers) >= BORROWERS_MAX and client_id not in loan.borrowers:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_BORROWERS", f"{BORROWERS_MAX} clients borrow it already"
            )
        loan.borrowers.add(client_id)
        loan.changed.set()
        return loan.memories, left_s

    def close(self) -> None:
        """Ends every loan's call: who lends keeps the memory for those who have borrowed it."""
        self._closing = True
        for loan in self._loans.values():
            loan.changed.set()

    def give_back(self, digest: bytes, client_id: str) -> None:
        """Of what was not borrowed, or is not lent any more, too: nothing is left to do then."""
        loan = self._loans.get(digest)
        if loan is None or client_id not in loan.borrowers:
            return
        loan.borrowers.discard(client_id)
        loan.returned_at = self._clock()
        loan.changed.set()

    def _loan(self, request: pb.LendImageRequest) -> _Loan:
        if len(request.manifest_digest) != 32:
            raise _bad(f"a manifest's digest has 32 bytes, not {len(request.manifest_digest)}")
        if not (math.isfinite(request.lease_s) and 0 < request.lease_s <= LEASE_S_MAX):
            raise _bad(f"a lease takes up to {LEASE_S_MAX:g} s, not {request.lease_s:g}")
        if not 1 <= len(request.memories) <= MEMORIES_MAX:
            raise _bad(f"one image is lent in 1 to {MEMORIES_MAX} memories, not {len(request.memories)}")
        if sum(len(memory.ranges) for memory in request.memories) > RANGES_MAX:
            raise _bad(f"one image is lent in at most {RANGES_MAX} ranges")
        for memory in request.memories:
            _check(memory)
        if request.manifest_digest in self._loans:
            raise Refused(
                grpc.StatusCode.ALREADY_EXISTS,
                "LENT_ALREADY",
                f"image {request.manifest_digest.hex()[:16]} is lent by another process of this node",
                manifest_digest=request.manifest_digest.hex(),
            )
        if len(self._loans) >= LENT_MAX:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_LENT",
                f"{LENT_MAX} images are lent on this node already: end one, or wait until its lease is over",
            )
        return _Loan(tuple(request.memories), self._clock() + request.lease_s)


def _check(memory: pb.DeviceMemory) -> None:
    if len(memory.handle) != HANDLE_BYTES:
        raise _bad(f"a handle has {HANDLE_BYTES} bytes, not {len(memory.handle)}")
    if not 1 <= len(memory.seal) <= SEAL_BYTES_MAX:
        raise _bad(f"a seal has 1 to {SEAL_BYTES_MAX} bytes, not {len(memory.seal)}")
    if not 1 <= len(memory.device_uuid) <= NAME_LENGTH_MAX:
        raise _bad("a device's UUID is missing or too long")
    for part in memory.ranges:
        if not 1 <= len(part.file) <= NAME_LENGTH_MAX:
            raise _bad("a range's file is missing or its name too long")


def _devices(loan: _Loan) -> str:
    return ", ".join(memory.device_uuid for memory in loan.memories)


def _bad(problem: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", problem)
