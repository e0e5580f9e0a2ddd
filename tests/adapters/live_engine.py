"""A real AsyncLLM on a loop of its own thread, as a server has it; tests stand where the controller does.

Run as a script it prints what an engine freshly started on a checkpoint answers: the oracle.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
START_DEADLINE_S = 240.0
CALL_DEADLINE_S = 120.0
PROMPTS = ("t5 t6 t7 t8", "t9 t100 t200", "t300")
T = TypeVar("T")
Tokens = list[list[int]]


@dataclass(frozen=True)
class Oracle:
    """What a checkpoint answers."""

    tokens: Tokens
    fingerprint: bytes


class LiveEngine:
    """Blocking calls from any thread into an engine that lives on its own."""

    def __init__(self, folder: Path) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_WORKER_MULTIPROCESSING_METHOD="spawn"
        )
        if str(HERE) not in sys.path:
            sys.path.insert(0, str(HERE))  # a spawned worker gets this path too, and imports the extension from it
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()
        self.llm: Any = self.call(_start(folder), START_DEADLINE_S)
        self._requests = 0

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float = CALL_DEADLINE_S) -> T:
        return self.submit(work).result(deadline_s)

    def rpc(self, method: str, *args: Any) -> dict[str, Any]:
        """One rank's answer, without the window."""
        (answer,) = self.call(self.llm.collective_rpc(f"hotweights_{method}", args=("test", *args)))
        return dict(answer)

    def inject(self, failpoints: str) -> None:
        self.extension("inject_failpoints", failpoints)

    def extension(self, method: str, *args: Any) -> Any:
        """What a method of the test's own extension answers."""
        (answer,) = self.call(self.llm.collective_rpc(method, args=args))
        return answer

    async def stream(self, prompt: str, count: int) -> AsyncIterator[list[int]]:
        """Greedy tokens as they come; use on the engine's loop."""
        from vllm import SamplingParams

        self._requests += 1
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        async for output in self.llm.generate(prompt, params, f"r{self._requests}"):
            yield list(output.outputs[0].token_ids)

    async def answer(self, prompt: str, count: int = 12) -> list[int]:
        last: list[int] = []
        async for tokens in self.stream(prompt, count):
            last = tokens
        return last

    def tokens(self) -> Tokens:
        async def all_prompts() -> Tokens:
            return list(await asyncio.gather(*(self.answer(prompt) for prompt in PROMPTS)))

        return self.call(all_prompts())

    def oracle(self) -> Oracle:
        while not (answer := self.rpc("fingerprint"))["done"]:
            assert answer["ok"], answer
        return Oracle(self.tokens(), answer["fingerprint"])

    def close(self) -> None:
        self.call(_shut_down(self.llm))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


async def _start(folder: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            enforce_eager=True,
            max_model_len=1024,
            dtype="bfloat16",
            worker_extension_cls="failpoint_extension.FailpointExtension",
        )
    )


async def _shut_down(llm: Any) -> None:
    llm.shutdown()
    await asyncio.sleep(0)


def fresh_oracle(folder: Path) -> Oracle:
    """Of an engine started for this, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=START_DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return Oracle(answer["tokens"], bytes.fromhex(answer["fingerprint"]))


if __name__ == "__main__":
    engine = LiveEngine(Path(sys.argv[1]))
    found = engine.oracle()
    engine.close()
    print(json.dumps({"tokens": found.tokens, "fingerprint": found.fingerprint.hex()}))
