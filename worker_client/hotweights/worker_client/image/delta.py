"""What changed of a bucket, as gaps and values: for a version in which few weights differ from the one before.

    head: how many gaps, how many values (4 bytes each, little endian)
    gaps: 1 byte each; N < 255: the lane after the next N changed, 255: the next 255 did not
    values: 2 bytes each, what the changed lanes hold; then the last byte of a bucket of an odd size

A lane is two bytes: one bf16 weight, half an fp32 one. At 1 % of bf16 weights changed this is a 66th of the bucket.
Nothing of it is trusted: what `apply_delta` makes is hashed by whoever takes it, as any bucket is.
"""

import struct
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Lanes: TypeAlias = npt.NDArray[np.uint16]
Positions: TypeAlias = npt.NDArray[np.int64]

# Of lanes: each takes three bytes, so a delta is a quarter of the bucket at most. Above it the plain bucket is sent:
# finding and placing what changed would take longer than the wire.
CHANGED_MAX = 1 / 6

_HEAD = struct.Struct("<II")
_LANE, _WORD = np.dtype("<u2"), np.dtype("<u8")
_LANES_OF_WORD = _WORD.itemsize // _LANE.itemsize
_SKIP = 255
_PIECE_LANES = 256 << 10  # compared at once: two of them fit a core's cache
_LOOK_LANES = 1024  # so many, spread over the bucket, tell whether it is worth it
_FEW = 0.1  # of words that differ, up to which it is faster to look for them first


class BadDelta(ValueError):
    """Not what `make_delta` makes for a bucket of this size."""


def make_delta(target: memoryview, base: memoryview) -> bytes | None:
    """What makes `target` of `base`, both contiguous bytes; None where plain bytes do as well or the sizes differ."""
    if target.nbytes != base.nbytes:
        return None
    now, before = _lanes(target), _lanes(base)
    stride = max(1, now.size // _LOOK_LANES)
    look = now[::stride] != before[::stride]
    if np.count_nonzero(look) > 1.5 * CHANGED_MAX * look.size:
        return None
    pieces = range(0, now.size, _PIECE_LANES)
    found = [_changed(now[at : at + _PIECE_LANES], before[at : at + _PIECE_LANES]) + at for at in pieces]
    changed = np.concatenate(found) if found else np.empty(0, np.int64)
    if changed.size > CHANGED_MAX * now.size:
        return None
    gaps = _gaps(changed)
    head = _HEAD.pack(gaps.size, changed.size)
    delta = b"".join((head, gaps.tobytes(), now.take(changed).tobytes(), bytes(target[2 * now.size :])))
    return delta if len(delta) < target.nbytes else None


def apply_delta(delta: bytes | memoryview, bucket: memoryview) -> None:
    """Makes the target of the base in place. Raises BadDelta; what `bucket` holds is unknown then."""
    size, tail = bucket.nbytes, bucket.nbytes % 2
    if len(delta) < _HEAD.size:
        raise BadDelta(f"{len(delta)} bytes are none")
    gap_count, count = _HEAD.unpack_from(delta)
    if len(delta) != _HEAD.size + gap_count + 2 * count + tail:
        raise BadDelta(f"{len(delta)} bytes with {gap_count} gaps and {count} values")
    if (
        count > CHANGED_MAX * (size // 2) or gap_count > count + size // 2 // _SKIP
    ):  # before any memory is taken for them
        raise BadDelta(f"{count} values and {gap_count} gaps for {size} bytes are more than are ever made")
    gaps = np.frombuffer(delta, dtype=np.uint8, count=gap_count, offset=_HEAD.size)
    values = np.frombuffer(delta, dtype=_LANE, count=count, offset=_HEAD.size + gap_count)
    unchanged_before = np.cumsum(gaps, dtype=np.int64)[gaps != _SKIP]
    positions = unchanged_before + np.arange(unchanged_before.size)
    if positions.size != count or (count and positions[-1] >= size // 2):
        raise BadDelta(f"{positions.size} places for {count} values")
    _lanes(bucket)[positions] = values
    if tail:
        bucket[size - 1 :] = delta[-1:]


def _lanes(view: memoryview) -> Lanes:
    return np.frombuffer(view, dtype=_LANE, count=view.nbytes // 2)


def _changed(now: Lanes, before: Lanes) -> Positions:
    """Where they differ, in order. Where little did, words first: most of the work is over with them."""
    whole = now.size - now.size % _LANES_OF_WORD
    words_now, words_before = now[:whole].view(_WORD), before[:whole].view(_WORD)
    (words,) = np.nonzero(words_now != words_before)
    if words.size > _FEW * words_now.size or whole < now.size:
        return np.flatnonzero(now != before)
    (inside,) = np.nonzero((words_now.take(words) ^ words_before.take(words)).view(_LANE) != 0)
    positions: Positions = (words * _LANES_OF_WORD).take(inside // _LANES_OF_WORD) + inside % _LANES_OF_WORD
    return positions


def _gaps(changed: Positions) -> npt.NDArray[np.uint8]:
    """Between these places, from before the first on; the long ones with their 255s before them."""
    distances = np.empty(changed.size, np.int64)
    distances[:1] = changed[:1]
    np.subtract(changed[1:], changed[:-1] + 1, out=distances[1:])
    (long,) = np.nonzero(distances >= _SKIP)
    if not long.size:
        return distances.astype(np.uint8)
    skips = distances[long] // _SKIP
    distances[long] -= _SKIP * skips
    gaps = np.full(changed.size + int(skips.sum()), _SKIP, dtype=np.uint8)
    is_last = np.ones(gaps.size, dtype=np.bool_)
    is_last[np.repeat(long, skips) + np.arange(gaps.size - changed.size)] = False
    gaps[is_last] = distances
    return gaps
