"""What a window writes, made ready before it: each write knows its way back and can prove what is there.

    storage of now, storage to be --difference--> Elements: some values, or runs of them, by their places
                                             \\--> Whole: all of it
    packed layer, new function    --------------> Function

A write is bit for bit: values that differ are written, whatever they mean. A proof is a digest of what is read back
from where was written: in the pause there is no time for more, and everything is fingerprinted after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from blake3 import blake3

from hotweights.adapters.undo import storage_bytes

RUNS = (1, 16, 256)
"""Values written together by one place, those lengths that divide the storage."""
LINE_BYTES = 16
"""What a place costs at least, however little is written there: memory moves by lines (64 bytes, read and written),
and it is on places far apart that the pause is spent."""
INDEX_BYTES = 8
_SUMMED = 1024

Array = Any  # numpy.ndarray: its stubs differ between the versions that vLLM pins
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Write(Protocol):
    """One place that an update changes."""

    @property
    def new_bytes(self) -> int:
        """That are written; without the places."""

    @property
    def old_proof(self) -> bytes:
        """What `proof` gives before."""

    @property
    def new_proof(self) -> bytes:
        """And after."""

    def write(self) -> None:
        """What is to be. As often as one likes."""

    def undo(self) -> None:
        """What was, wherever a failed `write` had got to."""

    def proof(self) -> bytes:
        """Of what is there."""


class Elements:
    """Some values of a storage in host memory."""

    def __init__(self, live: Array, places: Array, new: Array) -> None:
        """`live` is the storage as an array of values, or of runs of them; `new` holds one for each place."""
        self._live, self._places = live, places
        self._new, self._old = new, live[places]
        self.new_bytes = int(new.nbytes)
        self.new_proof, self.old_proof = (blake3(values.tobytes()).digest() for values in (new, self._old))

    def write(self) -> None:
        self._live[self._places] = self._new

    def undo(self) -> None:
        self._live[self._places] = self._old

    def proof(self) -> bytes:
        return blake3(self._live[self._places].tobytes()).digest()


class Whole:
    """All of a storage; what is to be lies elsewhere and is copied in the pause."""

    def __init__(
        self, live: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], new_proof: bytes
    ) -> None:
        """`live` is the storage as bytes, `pairs` are (view of it, what it is to hold)."""
        self._live, self._pairs = live, pairs
        self._old = live.clone()
        self.new_bytes = live.numel()
        self.new_proof, self.old_proof = new_proof, proof_of(self._old)

    @torch.no_grad()
    def write(self) -> None:
        for target, source in self._pairs:
            target.copy_(source)

    @torch.no_grad()
    def undo(self) -> None:
        self._live.copy_(self._old)

    def proof(self) -> bytes:
        return proof_of(self._live)


@dataclass(frozen=True)
class Reversed:
    """A write that was done, the other way round."""

    done: Write

    @property
    def new_bytes(self) -> int:
        return self.done.new_bytes

    @property
    def old_proof(self) -> bytes:
        return self.done.new_proof

    @property
    def new_proof(self) -> bytes:
        return self.done.old_proof

    def write(self) -> None:
        self.done.undo()

    def undo(self) -> None:
        self.done.write()

    def proof(self) -> bytes:
        return self.done.proof()


@dataclass(frozen=True)
class Function:
    """What a packed layer computes with."""

    layer: torch.nn.Module
    name: str
    new: Any
    old: Any
    new_bytes: int = 0
    old_proof: bytes = b"old"
    new_proof: bytes = b"new"

    def write(self) -> None:
        self.layer.__dict__[self.name] = self.new

    def undo(self) -> None:
        self.layer.__dict__[self.name] = self.old

    def proof(self) -> bytes:
        now = self.layer.__dict__.get(self.name)
        return self.new_proof if now is self.new else self.old_proof if now is self.old else b""


def proof_of(data: torch.Tensor) -> bytes:
    """Of bytes, at the speed of memory: BLAKE3 over the sums of their words, block by block.

    Shows what was not written, or not there; that two words of one block changed places it does not show.
    """
    words = data.numel() // 8
    whole = words - words % _SUMMED
    hasher = blake3()
    if whole:
        sums = data[: whole * 8].view(torch.int64).view(-1, _SUMMED).sum(1)
        hasher.update(sums.cpu().numpy().tobytes())
    return hasher.update(data[whole * 8 :].cpu().numpy().tobytes()).digest()


def difference(
    live: torch.UntypedStorage,
    new: torch.UntypedStorage,
    itemsize: int,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Write | None:
    """What turns one storage into the other with the fewest bytes; None when they are equal.

    `itemsize` is a value's bytes; `pairs` say where from all of it is written, if all of it is.
    """
    now, to_be = (_values(storage, itemsize) for storage in (live, new))
    differs = now != to_be
    count = int(np.count_nonzero(differs))
    if not count:
        return None
    costs = {1: count * (INDEX_BYTES + max(itemsize, LINE_BYTES))}
    for run in RUNS[1:]:
        if not len(differs) % run:
            runs = int(np.count_nonzero(differs.reshape(-1, run).any(1)))
            costs[run] = runs * (INDEX_BYTES + max(run * itemsize, LINE_BYTES))
    run = min(costs, key=lambda length: costs[length])
    if costs[run] >= live.nbytes():
        return Whole(storage_bytes(live), pairs, proof_of(storage_bytes(new)))
    if run == 1:
        places = np.flatnonzero(differs)
        return Elements(now, places, to_be[places])
    places = np.flatnonzero(differs.reshape(-1, run).any(1))
    kind = np.dtype((np.void, run * itemsize))
    return Elements(now.view(kind), places, to_be.view(kind)[places])


def _values(storage: torch.UntypedStorage, itemsize: int) -> Array:
    data = storage_bytes(storage)
    return data.view(_INTEGERS[itemsize if not data.numel() % itemsize else 1]).numpy()
