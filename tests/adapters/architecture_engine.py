"""A live engine of any architecture, without a tokenizer: what it answers, with logprobs, and what it holds.

Run as a script, `architecture_engine.py FOLDER RANKS [METHOD]`, it prints that of an engine freshly started.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests import warm
from tests.adapters.live_engine import START_DEADLINE_S, LiveEngine
from tests.adapters.swaps import prepare_all

PROMPTS = ([5, 6, 7, 8], [9, 100, 200], [300], [17 * n % 490 + 5 for n in range(150)])
COUNT = 12


class ArchitectureEngine:
    """One engine; what is prepared is proven with the image in `base`.

    It `is_mute` where vLLM loads the model but has no kernel to run it: its build for CPUs without AVX-512 lacks those
    of quantised layers. What the ranks hold is compared all the same.
    `method` is vLLM's of speculative decoding, with the draft model in `draft`: the checkpoint's own unless given.
    """

    def __init__(self, folder: Path, ranks: int, method: str = "", draft: Path | None = None) -> None:
        shape: dict[str, Any] = {"tensor_parallel_size": ranks} if ranks > 1 else {}
        if method:
            model = folder / "draft" if draft is None else draft
            shape["speculative_config"] = {"method": method, "model": str(model), "num_speculative_tokens": 3}
        self.live = LiveEngine(folder, skip_tokenizer_init=True, max_num_seqs=8, **shape)
        self._asked = 0
        self.is_mute = "quantization_config" in json.loads((folder / "config.json").read_text()) and not has_avx512()

    def answers(self) -> list[Any]:
        """Greedy tokens of every prompt, each with its logprob."""

        async def one(prompt: list[int]) -> Any:
            from vllm import SamplingParams

            self._asked += 1
            params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=1, detokenize=False)
            stream = self.live.llm.generate({"prompt_token_ids": prompt}, params, f"a{self._asked}")
            output = [part async for part in stream][-1].outputs[0]
            chosen = zip(output.token_ids, output.logprobs, strict=True)
            return [[token, logprobs[token].logprob] for token, logprobs in chosen]

        if self.is_mute:
            return []
        # One after the other: what shares a batch may be rounded in another way.
        return [self.live.call(one(prompt)) for prompt in PROMPTS]

    def fingerprints(self) -> list[str]:
        """Of every rank."""
        while True:
            answers = self.live.rpc_all("fingerprint")
            assert all(answer["ok"] for answer in answers), answers
            if all(answer["done"] for answer in answers):
                return [answer["fingerprint"].hex() for answer in answers]

    def found(self) -> dict[str, Any]:
        """What it answers and holds."""
        return {"fingerprints": self.fingerprints(), "answers": self.answers()}

    def route(self, name: str) -> None:
        """As HOTWEIGHTS_ROUTE."""
        self.live.extension("inject_route", name)

    def prepare(self, folder: Path, base: Path) -> list[dict[str, Any]]:
        """By which routes, of every rank; anew."""
        self.live.base = base
        prepare_all(self.live, folder)
        return [answer["routes"] for answer in self.live.rpc_all("prepared")]

    def call(self, method: str, *args: Any) -> None:
        """In every rank, all of which must be ok; nothing stays cached."""
        answers = self.live.rpc_all(method, *args)
        assert all(answer["ok"] for answer in answers), answers
        self.live.call(self.live.llm.reset_prefix_cache())

    def close(self) -> None:
        self.live.close()


def has_avx512() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_supported())


def fresh(folder: Path, ranks: int, method: str = "") -> dict[str, Any]:
    """Of an engine started for this, in a process of its own."""
    done = warm.run(Path(__file__), str(folder), str(ranks), method, deadline_s=START_DEADLINE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    engine = ArchitectureEngine(Path(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]))
    seen = engine.found()
    engine.close()
    print(json.dumps(seen))
