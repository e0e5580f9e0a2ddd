"""What a window writes, made ready before it: each write knows its way back and can prove what is there.

    storage of now, storage to be --difference--> Elements: some values, or runs of them, by their places
                                             \\--> Whole: all of it
    packed layer, new function    --------------> Function

Those of a device's memory are in `device_writes`.

A write is bit for bit: values that differ are written, whatever they mean. A proof is a digest of what is read back
from where was written: in the pause there is no time for more, and everything is fingerprinted after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from blake3 import blake3

from hotweights.adapters.bits import WORD_BYTES
from hotweights.adapters.undo import storage_bytes

RUNS = (1, 16, 256)
"""Values written together by one place, those lengths that divide the storage."""
LINE_BYTES = 16
"""What a place costs at least, however little is written there: memory moves by lines (64 bytes, read and written),
and it is on places far apart that the pause is spent."""
INDEX_BYTES = 8
AT_ONCE = 4096
"""Places that are written and then read back: so many lines stay in the nearest caches. Read later, each costs three
times what writing it costs."""
_SUMMED = 1024

Array = Any  # numpy.ndarray: its stubs differ between the versions that vLLM pins
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Write(Protocol):
    """One place that an update changes."""

    @property
    def new_bytes(self) -> int:
        """That are written; without the places."""

    @property
    def on_host(self) -> bool:
        """Whether `proof` is cheapest right after the write; a device is asked when all writes are on their way."""

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

    on_host = True

    def __init__(self, live: Array, places: Array, new: Array) -> None:
        """`live` is the storage as an array of values, or of runs of them; `new` holds one for each place."""
        self._live, self._places = live, places
        self._new, self._old = new, live[places]
        self._seen: Array | None = None
        self.new_bytes = int(new.nbytes)
        self.new_proof, self.old_proof = (_proof_of_array(values) for values in (new, self._old))

    def write(self) -> None:
        self._put(self._new)

    def undo(self) -> None:
        self._put(self._old)

    def _put(self, values: Array) -> None:
        """Writes, and reads back while the memory is near."""
        self._seen, seen = None, np.empty_like(values)
        for at in range(0, len(values), AT_ONCE):
            places = self._places[at : at + AT_ONCE]
            self._live[places] = values[at : at + AT_ONCE]
            seen[at : at + AT_ONCE] = self._live[places]
        self._seen = seen

    def proof(self) -> bytes:
        """Right after a write or undo of what was read back then, else of what is there now."""
        seen, self._seen = self._seen, None
        return _proof_of_array(self._live[self._places] if seen is None else seen)


class Whole:
    """All of a storage; what is to be lies elsewhere and is copied in the pause."""

    on_host = True

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
    def on_host(self) -> bool:
        return self.done.on_host

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
    on_host: bool = True
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


def _proof_of_array(values: Array) -> bytes:
    return proof_of(torch.from_numpy(values.view(np.uint8)))


@dataclass(frozen=True)
class Difference:
    """Where two storages differ, and what to write of it: the cheapest there is."""

    run: int
    """How many values each place stands for; 0 where all of it is to be written."""
    places: Array
    now: Array
    to_be: Array
    """Both storages whole, as integers of the values' size; where they lie, something else may come to be."""

    def runs(self, values: Array) -> Array:
        """Values by places: an array of them, or of whole runs."""
        return values if self.run == 1 else values.view(np.dtype((np.void, self.run * values.itemsize)))


def difference(now: torch.UntypedStorage, to_be: torch.UntypedStorage, itemsize: int) -> Difference | None:
    """Of two storages in host memory; None when they are equal. `itemsize` is a value's bytes."""
    one, other = (_values(storage, itemsize) for storage in (now, to_be))
    in_word = WORD_BYTES // one.itemsize
    end = len(one) - len(one) % in_word  # of whole words
    words, others = (values[:end].view(np.int64) for values in (one, other))
    differs = words != others
    beyond = np.flatnonzero(one[end:] != other[end:]) + end
    count = int(np.count_nonzero(differs)) + len(beyond)
    if not count:
        return None
    # Where there are runs, nothing is beyond the words.
    by_run = {run: _any(differs, run // in_word) for run in RUNS[1:] if not len(one) % run}
    costs = {run: int(np.count_nonzero(found)) * _cost(run * one.itemsize) for run, found in by_run.items()}
    places: Array = None
    if count * _cost(one.itemsize) < min((one.nbytes, *costs.values())):  # in each of these words one value at least
        places = np.concatenate((_places(words, others, differs, one.dtype), beyond))
        costs[1] = len(places) * _cost(one.itemsize)
    run = min(costs, key=lambda length: costs[length], default=0)
    if not run or costs[run] >= one.nbytes:
        return Difference(0, None, one, other)
    return Difference(run, places if run == 1 else np.flatnonzero(by_run[run]), one, other)


def _cost(size: int) -> int:
    """Of so many bytes that are written at a place."""
    return INDEX_BYTES + max(size, LINE_BYTES)


def _any(differs: Array, times: int) -> Array:
    """Whether one of so many is true, of each of those that follow one another. `times` is a power of two."""
    while times > 1:
        step = min(times, WORD_BYTES)
        differs = differs.view(f"u{step}") != 0
        times //= step
    return differs


def _places(words: Array, others: Array, differs: Array, kind: Any) -> Array:
    """Of the values that differ, where only few words do: those alone are looked at again."""
    at = np.flatnonzero(differs)
    found = np.flatnonzero((words[at] ^ others[at]).view(kind) != 0)
    in_word = WORD_BYTES // kind.itemsize
    shift = in_word.bit_length() - 1
    return (at[found >> shift] << shift) | (found & (in_word - 1))


def host_write(
    live: torch.UntypedStorage, found: Difference, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Write:
    """What writes a difference to its storage, in host memory. `pairs`: where from, if all of it is written."""
    if not found.run:
        to_be = torch.from_numpy(found.to_be).view(torch.uint8)
        return Whole(storage_bytes(live), pairs, proof_of(to_be))
    return Elements(found.runs(found.now), found.places, found.runs(found.to_be)[found.places])


def _values(storage: torch.UntypedStorage, itemsize: int) -> Array:
    data = storage_bytes(storage)
    return data.view(_INTEGERS[itemsize if not data.numel() % itemsize else 1]).numpy()
