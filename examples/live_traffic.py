"""Streaming clients that never stop, and what they saw."""

import asyncio
import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

REQUEST_DEADLINE_S = 120.0
RETRY_S = 0.5


@dataclass
class Seen:
    """Counts and moments (time.monotonic) of what the clients got."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)

    def tokens_between(self, start: float, end: float) -> int:
        return sum(start <= at <= end for at in self.token_times)

    def longest_gap_ms(self, start: float, end: float) -> float:
        """The longest time in which no client got a token."""
        times = [start, *sorted(at for at in self.token_times if start <= at <= end), end]
        return 1000 * max(b - a for a, b in itertools.pairwise(times))


class Traffic:
    """`clients` streams at a time, from a thread of their own, until `stop`."""

    def __init__(self, base_url: str, model: str, clients: int) -> None:
        self.seen = Seen()
        self._base_url, self._model, self._clients = base_url, model, clients
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(REQUEST_DEADLINE_S)

    async def _run(self) -> None:
        from openai import AsyncOpenAI

        # max_retries 0: a failed request is a failed request.
        async with AsyncOpenAI(
            base_url=self._base_url, api_key="none", max_retries=0, timeout=REQUEST_DEADLINE_S
        ) as client:
            await asyncio.gather(*(self._stream(client, n) for n in range(self._clients)))

    async def _stream(self, client: Any, number: int) -> None:
        from openai import OpenAIError

        turn = 0
        while not self._stopping.is_set():
            turn += 1
            prompt = " ".join(f"t{(number * 31 + turn * 7 + i) % 500 + 3}" for i in range(8))
            self.seen.requests += 1
            try:
                stream = await client.completions.create(
                    model=self._model,
                    prompt=prompt,
                    max_tokens=48,
                    temperature=0.0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                tokens = 0
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].text:
                        tokens += 1
                        self.seen.token_times.append(time.monotonic())
                if not tokens:
                    self.seen.failures.append("a stream ended without a token")
            except OpenAIError as error:
                self.seen.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(RETRY_S)  # a server that is gone is not asked as fast as it refuses
