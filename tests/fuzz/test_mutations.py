"""A short walk around every fuzz target's seeds, the same in every run; `make fuzz` looks further."""

import random
from collections.abc import Iterator

import pytest
from tests.fuzz.targets import TARGETS, tidy

SEED = 20261125
INTERESTING = (b"", b"\0", b"\xff", b"\x80", b"\xff" * 8, b"\0" * 8, "²".encode(), b"\n", b"=", b":", b"9" * 30)


@pytest.fixture(scope="module", autouse=True)
def tidied() -> Iterator[None]:
    yield
    tidy()


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_lets_anything_out(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        attempt(name, seed)
    draw = random.Random(f"{SEED} {name}")
    for _ in range(target.mutations):
        attempt(name, mutated(draw, seeds)[: target.length_max])


def attempt(name: str, data: bytes) -> None:
    try:
        TARGETS[name].run(data)
    except BaseException:
        print(f"{name} let something out for {data!r}")
        raise


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """One to four changes to a seed: bits, bytes, pieces gone, doubled, or taken from another seed."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
            case 2:
                data[at : at + draw.randint(1, 16)] = b""
            case 3:
                data[at:at] = data[at : at + draw.randint(1, 16)]
            case 4:
                data[at : at + draw.randint(0, 8)] = draw.choice(INTERESTING)
            case _:
                other = draw.choice(seeds)
                begin = draw.randrange(len(other) + 1)
                data[at : at + draw.randint(0, 32)] = other[begin : begin + draw.randint(1, 32)]
    return bytes(data)
