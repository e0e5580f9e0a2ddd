"""Writes into a device's memory: places and values lie there before the pause, as far as a budget goes.

    host: old values, new values --upload while serving--> device memory   (within the budget)
                                 --pin in place----------> the host's own  (the rest: uploaded in the pause)
    device memory of another process, lent to us -----------------------> read where it is

In the pause there are one or a few launches a storage and no copy back but of sums. Nothing that serves is moved or
allocated anew, so that addresses stay as CUDA graphs recorded them.
"""

import functools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from blake3 import blake3

from hotweights.adapters.placed import PIECE_BYTES, Budget, Placed
from hotweights.adapters.undo import storage_bytes
from hotweights.adapters.writes import Difference

BLOCK_BYTES = 32 << 10
"""That one sum stands for when they are read back."""


class DeviceWrite(ABC):
    """Is proven when all writes of the update are on their way: see ReadBack."""

    on_host = False
    is_lent = False
    """Whether what is summed in place comes from where others may write: those sums are weighted."""
    new_bytes: int
    new_sums: torch.Tensor
    old_sums: torch.Tensor
    """What ReadBack finds where it was written, and where it was not."""

    @abstractmethod
    def write(self) -> None:
        """See Write."""

    @abstractmethod
    def undo(self) -> None:
        """See Write."""

    @property
    def new_proof(self) -> bytes:
        return _proof(self.new_sums)

    @property
    def old_proof(self) -> bytes:
        return _proof(self.old_sums)

    def proof(self) -> bytes:
        return _proof(ReadBack([self]).sums())

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That is written to."""

    def summed_in_place(self) -> torch.Tensor | None:
        """Bytes on the device, whole blocks, which are written all."""
        return None

    @abstractmethod
    def gathered(self) -> Iterator["Part"]:
        """What else is written, in parts of at most PIECE_BYTES."""


@dataclass(frozen=True)
class Part:
    """Bytes that lie here and there, and how they are brought together on the device, in memory for so many."""

    size: int
    into: Callable[[torch.Tensor], object]


class ReadBack:
    """Of device writes: what is there now, as the sums of blocks of words, with few launches and one copy to the host.

    What is written whole is summed where it lies; the rest is gathered, much at a time, and summed together. As many
    storages as a model has, a launch more for each is milliseconds, and so is looking at each: all are compared at
    once.

    A plain sum shows what did not arrive. Of what comes from others, who might have put something else there, each half
    of a word is multiplied by a number that nobody knows: other bytes have the same sum once in 2**32.
    """

    def __init__(self, writes: Sequence[DeviceWrite]) -> None:
        """Takes its memory, PIECE_BYTES on the device, now."""
        self._device = writes[0].device
        together = [_whole_blocks(write) for write in writes]
        count = sum(len(write.new_sums) for write in writes)
        on_device = torch.empty(count, dtype=torch.int64, device=self._device)
        self._found = torch.empty(count, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._on_device = on_device
        self._scratch = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=self._device)
        self._steps: list[Callable[[], object]] = []
        self._batch: list[tuple[Part, torch.Tensor]] = []
        at = 0
        for write, blocks in zip(writes, together, strict=True):
            if write.is_lent:
                self._add_weighted(blocks, at)
            elif len(blocks):
                self._steps.append(partial(torch.sum, blocks, 1, out=on_device[at : at + len(blocks)]))
            at += len(blocks)
        for write in writes:
            for part in write.gathered():
                at = self._add(part, at)
        self._flush(at)
        self._counts = [len(blocks) for blocks in together]
        of_all = [write.old_sums for write in writes], [write.new_sums for write in writes]
        self._expected = [self._ordered(sums) for sums in of_all]
        self._lengths = [len(write.new_sums) for write in writes]

    def _add_weighted(self, blocks: torch.Tensor, at: int) -> None:
        weights, products = _weights(self._device), self._scratch.view(torch.int64)
        for halves in torch.split(blocks.view(torch.int32), max(1, PIECE_BYTES // (2 * BLOCK_BYTES))):
            product = products[: halves.numel()].view(halves.shape)
            self._steps.append(partial(torch.mul, halves, weights, out=product))
            self._steps.append(partial(torch.sum, product, 1, out=self._on_device[at : at + len(halves)]))
            at += len(halves)

    def reversed(self) -> "ReadBack":
        """Of the same writes the other way round, with the same memory."""
        found = copy(self)
        found._expected = self._expected[::-1]
        return found

    def _add(self, part: "Part", at: int) -> int:
        """To the batch; a full one goes first. Gives where the next sums go."""
        used = sum(len(place) for _, place in self._batch)
        padded = -(-part.size // BLOCK_BYTES) * BLOCK_BYTES
        if used + padded > PIECE_BYTES:
            at, used = self._flush(at), 0
        self._batch.append((part, self._scratch[used : used + padded]))
        return at

    def _flush(self, at: int) -> int:
        batch, self._batch = self._batch, []
        if not batch:
            return at
        self._steps.append(self._scratch.zero_)  # what no part fills counts as nothing
        self._steps += [partial(part.into, place[: part.size]) for part, place in batch]
        blocks = _blocks(self._scratch[: sum(len(place) for _, place in batch)])
        self._steps.append(partial(torch.sum, blocks, 1, out=self._on_device[at : at + len(blocks)]))
        return at + len(blocks)

    def _ordered(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of all what lies together, then of all what is gathered: as they are found."""
        both = list(zip(sums, self._counts, strict=True))
        return torch.cat([one[:count] for one, count in both] + [one[count:] for one, count in both])

    @torch.no_grad()
    def differing(self, *, written: bool) -> int | None:
        """The number of a write at whose place something else is than it wrote, or undid; None without one.

        Waits for the device.
        """
        for step in self._steps:
            step()
        self._found.copy_(self._on_device, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        expected = self._expected[written]
        if torch.equal(self._found, expected):
            return None
        first = int((self._found != expected).nonzero()[0])
        return self._number(first)

    def _number(self, at: int) -> int:
        gathered = [length - count for length, count in zip(self._lengths, self._counts, strict=True)]
        numbers = [number for counts in (self._counts, gathered) for number, n in enumerate(counts) for _ in range(n)]
        return numbers[at]

    def sums(self) -> torch.Tensor:
        """What is there now, in the order of `differing`: of one write, its own."""
        self.differing(written=True)
        return self._found.clone()


class DeviceElements(DeviceWrite):
    """Some values of a storage, or runs of them, by their places."""

    def __init__(
        self, live: torch.Tensor, places: torch.Tensor, new: torch.Tensor, old: torch.Tensor, budget: Budget
    ) -> None:
        """`live` is the storage on its device, of shape (runs, values of a run); the others are on the host."""
        self._live = live
        # First the places and what is to be: the way back is the rarer one.
        self._places, self._new, self._old = (budget.placed(host, live.device) for host in (places, new, old))
        held = (self._places, self._new, self._old)
        self._uploads = None
        if any(placed.tensor.device != live.device for placed in held):
            self._uploads = budget.uploads(live.device)
        self.new_bytes = new.nbytes
        self._at_once = max(1, PIECE_BYTES // max(places.itemsize, live[0].nbytes))
        self.new_sums, self.old_sums = (
            torch.cat([_sums_of(part.view(-1).view(torch.uint8)) for part in self._pieces(values)])
            for values in (new, old)
        )

    @torch.no_grad()
    def write(self) -> None:
        self._scatter(self._new.tensor)

    @torch.no_grad()
    def undo(self) -> None:
        self._scatter(self._old.tensor)

    def _scatter(self, values: torch.Tensor) -> None:
        device = self._live.device
        if self._places.tensor.device == device == values.device:
            self._live.index_copy_(0, self._places.tensor, values)
            return
        for places, part in zip(self._pieces(self._places.tensor), self._pieces(values), strict=True):
            if self._uploads is None:
                self._live.index_copy_(0, places, part)
            else:
                self._uploads.scatter(self._live, places, part)

    @property
    def device(self) -> torch.device:
        return self._live.device

    def gathered(self) -> Iterator[Part]:
        row = self._live[0].nbytes
        for places in self._pieces(self._places.tensor):
            yield Part(len(places) * row, partial(self._gather, places))

    def _gather(self, places: torch.Tensor, into: torch.Tensor) -> None:
        there = places.to(self._live.device, non_blocking=True)
        torch.index_select(self._live, 0, there, out=into.view(self._live.dtype).view(len(places), -1))

    def _pieces(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """By so many places at a time: what is needed beside the budget is bounded."""
        return iter(torch.split(values, self._at_once))


class DeviceWhole(DeviceWrite):
    """All of a storage."""

    def __init__(
        self,
        live: torch.Tensor,
        new: torch.Tensor,
        old: torch.Tensor,
        budget: Budget,
        lent: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """`live` is the storage on its device as bytes, `new` and `old` are bytes on the host, which are copied.

        `lent` are (view of the storage, device memory of others that it is to hold): then that is written, until
        `let_go`, but for what is left of whole blocks, and `new` takes none of the budget.
        """
        self._live = live
        self._lent = list(lent) if self._whole_blocks else []
        self.is_lent = bool(self._lent)
        place = partial(budget.placed, device=live.device, lasts=False)
        self._rest = place(new[self._whole_blocks :]) if self.is_lent else None
        self._new = Placed(new, live.device, False, lasts=False) if self.is_lent else place(new)
        self._old = place(old)
        self.new_bytes = new.nbytes
        self.new_sums, self.old_sums = (_sums_of(values, weighted=self.is_lent) for values in (new, old))

    def let_go(self) -> None:
        """Of the memory of others: from now on what is to be comes from the host."""
        self._lent.clear()

    @torch.no_grad()
    def write(self) -> None:
        if not self._lent:
            self._live.copy_(self._new.tensor, non_blocking=True)
            return
        for target, source in self._lent:
            target.copy_(source, non_blocking=True)
        if self._rest is not None:
            self._live[self._whole_blocks :].copy_(self._rest.tensor, non_blocking=True)

    @torch.no_grad()
    def undo(self) -> None:
        self._live.copy_(self._old.tensor, non_blocking=True)

    @property
    def device(self) -> torch.device:
        return self._live.device

    @property
    def _whole_blocks(self) -> int:
        return self._live.numel() - self._live.numel() % BLOCK_BYTES

    def summed_in_place(self) -> torch.Tensor | None:
        return self._live[: self._whole_blocks] if self._whole_blocks else None

    def gathered(self) -> Iterator[Part]:
        rest = self._live[self._whole_blocks :]
        if len(rest):
            yield Part(len(rest), lambda into: into.copy_(rest))


def _blocks(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.int64).view(-1, BLOCK_BYTES // 8)


def _whole_blocks(write: DeviceWrite) -> torch.Tensor:
    data = write.summed_in_place()
    return torch.empty(0, BLOCK_BYTES // 8, dtype=torch.int64) if data is None else _blocks(data)


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """One for each half of a word of a block; of this process alone."""
    if device.type != "cpu":
        return _weights(torch.device("cpu")).to(device)
    return torch.frombuffer(bytearray(secrets.token_bytes(2 * BLOCK_BYTES)), dtype=torch.int64)


def _sums_of(data: torch.Tensor, *, weighted: bool = False) -> torch.Tensor:
    """Of bytes on the host, as ReadBack finds them: what is left of whole blocks counts as one, and has no weights."""
    whole = data.numel() - data.numel() % BLOCK_BYTES
    blocks = _blocks(data[:whole])
    if weighted:
        pieces = torch.split(blocks.view(torch.int32), max(1, PIECE_BYTES // BLOCK_BYTES))
        sums = torch.cat([(halves * _weights(data.device)).sum(1) for halves in pieces])
    else:
        sums = blocks.sum(1)
    if whole == data.numel():
        return sums
    rest = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
    rest[: data.numel() - whole] = data[whole:]
    return torch.cat((sums, _blocks(rest).sum(1)))


def _proof(sums: torch.Tensor) -> bytes:
    return blake3(sums.numpy().tobytes()).digest()


def device_write(
    live: torch.UntypedStorage,
    found: Difference,
    budget: Budget,
    lent: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> DeviceWrite:
    """What writes a difference to its storage, on a device; both sides of `found` are in host memory.

    `lent`, if all of it is to be written, is where from: see DeviceWhole. It must cover what differs.
    """
    data = storage_bytes(live)
    if not found.run:
        new, old = (torch.from_numpy(values).view(torch.uint8) for values in (found.to_be, found.now))
        return DeviceWhole(data, new, old, budget, lent)
    chosen = (found.runs(values)[found.places].view(values.dtype) for values in (found.to_be, found.now))
    new, old = (torch.from_numpy(values).view(-1, found.run) for values in chosen)
    return DeviceElements(data.view(new.dtype).view(-1, found.run), torch.from_numpy(found.places), new, old, budget)
