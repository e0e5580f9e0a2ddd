"""What a fuzz target is. Each takes any bytes and may raise nothing: what it lets out is a find."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`seeds` are good inputs, and the ends of the format, for mutations to begin from."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    length_max: int = 4096
    # Of the short test in the suite.
    mutations: int = 2000


class Cursor:
    """Reads one input as a row of choices; past its end everything is 0 or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_done(self) -> bool:
        return self._at >= len(self._data)

    def number(self, below: int) -> int:
        """One byte's worth of choice."""
        taken = self.take(1)
        return taken[0] % below if taken else 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def part(self) -> bytes:
        """A piece with its length in two bytes before it."""
        return self.take(int.from_bytes(self.take(2), "big"))


def parts(*pieces: bytes) -> bytes:
    """What Cursor.part reads back, one after the other."""
    return b"".join(len(piece).to_bytes(2, "big") + piece for piece in pieces)
