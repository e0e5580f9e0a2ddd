"""What blocking work in a thread tells of itself, and how it hears that it is called off."""

from collections.abc import Callable


class CalledOff(Exception):
    """Nobody waits for the work any longer."""


def stoppable(progress: Callable[[int, int], None], stop: Callable[[], bool]) -> Callable[[int, int], None]:
    """`progress` for blocking work that ends with CalledOff once `stop()` is true."""

    def step(bytes_done: int, bytes_total: int) -> None:
        if stop():
            raise CalledOff
        progress(bytes_done, bytes_total)

    return step


class Figures:
    """Bytes done and in all; written by threads, read by the loop."""

    def __init__(self) -> None:
        self._now = (0, 0)

    def write(self, bytes_done: int, bytes_total: int) -> None:
        self._now = (bytes_done, bytes_total)  # one assignment: readers see a whole pair

    def read(self) -> tuple[int, int]:
        return self._now
