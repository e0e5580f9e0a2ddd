"""A real AsyncLLM on a loop of its own thread, as a server has it; tests stand where the controller does.

Run as a script it prints what an engine freshly started on a checkpoint answers: the oracle.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests import warm

HERE = Path(__file__).parent
START_DEADLINE_S = float(os.environ.get("TEST_START_DEADLINE_S", "240"))  # more on a machine that is busy otherwise
CALL_DEADLINE_S = 120.0
PROMPTS = ("t5 t6 t7 t8", "t9 t100 t200", "t300")
# Two whole blocks of the cache (128 tokens each on CPU) and some: only what is that long is ever shared.
LONG_PROMPT = " ".join(f"t{n}" for n in range(5, 305))
T = TypeVar("T")
Tokens = list[list[int]]


@dataclass(frozen=True)
class Oracle:
    """What a checkpoint answers."""

    tokens: Tokens
    fingerprint: bytes


class LiveEngine:
    """Blocking calls from any thread into an engine that lives on its own.

    The plugin is in the engine core and in the ranks as in a server, but the controller is left out.
    """

    def __init__(self, folder: Path, **arguments: Any) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_LOGGING_LEVEL=os.environ.get("TEST_VLLM_LOGGING", "ERROR"),
            VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
        )
        warm.use()
        self.base = folder
        if str(HERE) not in sys.path:
            sys.path.insert(0, str(HERE))  # a spawned worker gets this path too, and imports the extension from it
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()
        with _start_up(arguments):
            self.llm: Any = self.call(_start(folder, arguments), START_DEADLINE_S)
        self._requests = 0

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float = CALL_DEADLINE_S) -> T:
        return self.submit(work).result(deadline_s)

    def rpc(self, method: str, *args: Any) -> dict[str, Any]:
        """The one rank's answer, without the window."""
        (answer,) = self.rpc_all(method, *args)
        return answer

    def rpc_all(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Every rank's answer."""
        return [
            dict(answer) for answer in self.call(self.llm.collective_rpc(f"hotweights_{method}", args=("test", *args)))
        ]

    @property
    def windowed(self) -> Any:
        """As the window has it."""
        from hotweights.adapters.vllm_engine import AsyncCores, VllmEngine

        return VllmEngine(AsyncCores(self.llm, self.loop))

    def inject(self, failpoints: str, rank: int | None = None) -> None:
        """Sets failpoints in all ranks, or in one."""
        self.extension("inject_failpoints", failpoints, rank)

    def extension(self, method: str, *args: Any) -> Any:
        """What a method of the test's own extension answers, in the first rank."""
        return self.call(self.llm.collective_rpc(method, args=args))[0]

    async def stream(self, prompt: Any, count: int) -> AsyncIterator[list[int]]:
        """Greedy tokens as they come; use on the engine's loop."""
        from vllm import SamplingParams

        self._requests += 1
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        async for output in self.llm.generate(prompt, params, f"r{self._requests}"):
            yield list(output.outputs[0].token_ids)

    async def answer(self, prompt: Any, count: int = 12) -> list[int]:
        last: list[int] = []
        async for tokens in self.stream(prompt, count):
            last = tokens
        return last

    def tokens(self) -> Tokens:
        async def all_prompts() -> Tokens:
            together = await asyncio.gather(*(self.answer(prompt) for prompt in PROMPTS))
            return [*together, await self.answer(LONG_PROMPT)]

        return self.call(all_prompts())

    def oracle(self) -> Oracle:
        done = False
        while not done:
            answers = self.rpc_all("fingerprint")
            assert all(answer["ok"] for answer in answers), answers
            done = all(answer["done"] for answer in answers)
        return Oracle(self.tokens(), b"".join(answer["fingerprint"] for answer in answers))

    def close(self) -> None:
        self.call(_shut_down(self.llm))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        self.llm = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what vLLM leaves open of an engine that was torn is not ours to close
            gc.collect()


@contextlib.contextmanager
def _start_up(arguments: dict[str, Any]) -> Iterator[None]:
    """The plugin without a controller, and a core for each rank: vLLM keeps one of two for itself otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        if arguments.get("tensor_parallel_size", 1) > 1:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setattr("hotweights.adapters.vllm_auto._attach", lambda front_end: False)
        patch.setenv("HOTWEIGHTS_ENDPOINT", "tcp://127.0.0.1:9")  # nobody asks it
        yield


async def _start(folder: Path, arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            enforce_eager=True,
            max_model_len=1024,
            dtype="bfloat16",
            worker_extension_cls="failpoint_extension.FailpointExtension",
            **arguments,
        )
    )


async def _shut_down(llm: Any) -> None:
    llm.shutdown()
    # A torn engine leaves calls unanswered; what waits for them would hold vLLM's sockets until Python itself warns.
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    llm.engine_core.resources.ctx.destroy(linger=0)  # vLLM leaves that to the garbage collection


def fresh_oracle(folder: Path, **arguments: Any) -> Oracle:
    """Of an engine started for this, in a process of its own."""
    done = warm.run(Path(__file__), str(folder), json.dumps(arguments), deadline_s=START_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return Oracle(answer["tokens"], bytes.fromhex(answer["fingerprint"]))


if __name__ == "__main__":
    engine = LiveEngine(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    found = engine.oracle()
    engine.close()
    print(json.dumps({"tokens": found.tokens, "fingerprint": found.fingerprint.hex()}))
