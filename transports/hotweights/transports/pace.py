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

    async def take(self, size: int) -> None:
        """Returns when `size` bytes may go; whoever asks later waits longer. Called off, its turn is lost."""
        if self._bytes_s is None:
            return
        now = asyncio.get_running_loop().time()
        begins_at = max(self._free_at, now - BURST_S)
        self._free_at = begins_at + size / self._bytes_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)
