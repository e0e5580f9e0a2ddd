"""A limit on bytes a second, kept by whoever moves them: so that what is transferred leaves room for what is served."""

import asyncio

BURST_S = 0.1


class Pace:
    """At most `bytes_s` bytes a second, measured over more than BURST_S; None is no limit. Use from one event loop."""

    def __init__(self, bytes_s: float | None = None) -> None:
        self._bytes_s = bytes_s
        self._free_at = 0.0

    @property
    def piece_bytes(self) -> int | None:
        """The most that is worth asking for at once, so that others get their turn; None where there is no limit."""
        return None if self._bytes_s is None else max(16 << 10, int(self._bytes_s * BURST_S))

    def delay_s(self, size: int) -> float:
        """How long `take` would wait, if it were asked now."""
        if self._bytes_s is None:
            return 0.0
        now = asyncio.get_running_loop().time()
        return max(0.0, max(self._free_at, now - BURST_S) + size / self._bytes_s - now)

    def give_back(self, size: int) -> None:
        """What was taken and came to nothing is left to others."""
        if self._bytes_s is not None:
            self._free_at -= size / self._bytes_s

    async def take(self, size: int) -> None:
        """Returns when `size` bytes may go; whoever asks later waits longer. Called off, its turn is lost."""
        if self._bytes_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - BURST_S) + size / self._bytes_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)
