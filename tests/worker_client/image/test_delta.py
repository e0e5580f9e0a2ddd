"""What changed of a bucket, there and back; and whatever else could be taken for it."""

import contextlib
import struct

import numpy as np
import pytest

from hotweights.worker_client.image.delta import CHANGED_MAX, BadDelta, apply_delta, make_delta

LANES = 600_000  # more than one piece of what is compared at once


def a_bucket(size: int = 2 * LANES, seed: int = 1) -> bytearray:
    return bytearray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes())


def changed_at(base: bytearray, lanes: "list[int] | np.ndarray[tuple[int], np.dtype[np.int64]]") -> bytearray:
    target = bytearray(base)
    np.frombuffer(target, dtype="<u2", count=len(target) // 2)[np.asarray(lanes, dtype=np.int64)] ^= 0x0101
    return target


def rebuilt(delta: bytes, base: bytearray) -> bytearray:
    into = bytearray(base)
    apply_delta(delta, memoryview(into))
    return into


def made(target: bytearray, base: bytearray) -> bytes:
    delta = make_delta(memoryview(target), memoryview(base))
    assert delta is not None
    return delta


@pytest.mark.parametrize(
    "lanes",
    [
        [],
        [0],
        [LANES - 1],
        [0, 1, 2, LANES - 2, LANES - 1],
        [254],  # the longest gap of one byte
        [255],  # the first that takes two
        [256, 511, 766],
        [509, 510, 1020, 1021],
        [262_143, 262_144, 262_145],  # where one piece ends
        [599_999],
    ],
)
def test_changes_at_any_place_come_back_exactly(lanes: list[int]) -> None:
    base = a_bucket()
    target = changed_at(base, lanes)
    delta = made(target, base)
    assert rebuilt(delta, base) == target
    assert len(delta) < 20 + 3 * len(lanes) + LANES // 255


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 4097])
def test_small_and_odd_sizes_are_right_or_sent_plainly(size: int) -> None:
    base = a_bucket(size)
    for at in range(size):
        target = bytearray(base)
        target[at] ^= 1
        delta = make_delta(memoryview(target), memoryview(base))
        assert delta is None or (len(delta) < size and rebuilt(delta, base) == target)


def test_one_percent_of_bf16_weights_is_a_sixtieth_of_the_bucket() -> None:
    base = a_bucket()
    lanes = np.flatnonzero(np.random.default_rng(2).random(LANES) < 0.01)
    target = changed_at(base, lanes)
    delta = made(target, base)
    assert rebuilt(delta, base) == target
    assert 60 * len(delta) < len(base)


@pytest.mark.parametrize("share", [1.0, CHANGED_MAX + 0.02])
def test_where_much_changed_there_is_no_delta(share: float) -> None:
    base = a_bucket()
    target = changed_at(base, np.flatnonzero(np.random.default_rng(2).random(LANES) < share))
    assert make_delta(memoryview(target), memoryview(base)) is None


@pytest.mark.parametrize("begin", [0, LANES // 2, LANES - int(LANES * CHANGED_MAX)])
def test_changes_that_are_all_in_one_place_make_a_delta_up_to_the_limit(begin: int) -> None:
    base, many = a_bucket(), int(LANES * CHANGED_MAX)
    target = changed_at(base, list(range(begin, begin + many)))
    assert rebuilt(made(target, base), base) == target
    assert make_delta(memoryview(changed_at(base, list(range(many + 1)))), memoryview(base)) is None


def test_versions_of_other_sizes_have_no_delta() -> None:
    base = a_bucket(100)
    assert make_delta(memoryview(base), memoryview(base)[:98]) is None


@pytest.mark.parametrize(
    "delta",
    [
        b"",
        b"1234567",
        struct.pack("<II", 0, 1),  # a value that is not there
        struct.pack("<II", 1, 0) + b"\x00\x00",  # more than was announced
        struct.pack("<II", 2, 1) + b"\x00\x00" + b"vv",  # two places for one value
        struct.pack("<II", 1, 1) + b"\xff" + b"vv",  # no place for it
        struct.pack("<II", 1, 1) + b"\x32" + b"vv",  # beyond the end: lane 50 of 50
        struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + b"x",
        struct.pack("<II", 99, 0) + b"\xff" * 99,  # longer than any that is made: memory is taken for each
        struct.pack("<II", 9, 9) + bytes(9) + bytes(18),
    ],
)
def test_what_is_no_delta_of_this_bucket_is_refused(delta: bytes) -> None:
    base = a_bucket(100)
    with pytest.raises(BadDelta):
        rebuilt(delta, base)


def test_any_bytes_at_all_are_refused_or_stay_within_the_bucket() -> None:
    random = np.random.default_rng(3)
    base = a_bucket(400)
    good = made(changed_at(base, [3, 90, 91]), base)
    for _ in range(2000):
        bad = bytearray(good)
        for at in random.integers(0, len(bad), 3):
            bad[at] = random.integers(0, 256)
        around = bytearray(b"\xaa" * 600)
        with contextlib.suppress(BadDelta):
            apply_delta(bytes(bad), memoryview(around)[100:500])
        assert around[:100] == around[500:] == b"\xaa" * 100
