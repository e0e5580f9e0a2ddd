"""How often something may be written down that a stranger can cause as often as he likes.

Two buckets, of one source and of all sources together; what finds one empty is only counted, and the
number goes with the next that is written.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SOURCES_MAX = 1024


@dataclass(frozen=True)
class Rate:
    """A burst at once, then one every `every_s` seconds."""

    burst: int
    every_s: float


class _Bucket:
    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._level = float(rate.burst)
        self._at = now

    def holds_one(self, now: float) -> bool:
        self._level = min(self._rate.burst, self._level + (now - self._at) / self._rate.every_s)
        self._at = now
        return self._level >= 1

    def take(self) -> None:
        self._level -= 1


class Allowance:
    """Use from one thread. Remembers the last SOURCES_MAX sources."""

    def __init__(self, of_one: Rate, of_all: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_one = of_one
        self._clock = clock
        self._all = _Bucket(of_all, clock())
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()
        self._passed_over = 0

    def take(self, source: str) -> int | None:
        """None if it must not be written; else how many were passed over since the last one that was."""
        now = self._clock()
        one = self._sources.setdefault(source, _Bucket(self._of_one, now))
        self._sources.move_to_end(source)
        if len(self._sources) > SOURCES_MAX:
            self._sources.popitem(last=False)
        # Both are looked at before either pays.
        if not (one.holds_one(now) and self._all.holds_one(now)):
            self._passed_over += 1
            return None
        one.take()
        self._all.take()
        passed_over, self._passed_over = self._passed_over, 0
        return passed_over

    def give_back(self, passed_over: int) -> None:
        """It was not written after all: it counts, with those that it would have told of."""
        self._passed_over += passed_over + 1
