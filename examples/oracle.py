"""A freshly started engine, as the measure of what a swapped one must equal.

    python examples/oracle.py FOLDER --prompt "t5 t6" --prompt "t9"

prints one JSON line: greedy outputs of the prompts, and the fingerprint of every rank.
"""

import argparse
import json
import os
import time
from typing import Any

FINGERPRINT_DEADLINE_S = 120.0
MAX_TOKENS = 12


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--prompt", action="append", required=True)
    arguments = parser.parse_args()
    os.environ.pop("HOTWEIGHTS_ENDPOINT", None)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=arguments.folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        worker_extension_cls="hotweights.adapters.vllm_extension.HotweightsWorkerExtension",
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = [llm.generate([p], sampling, use_tqdm=False)[0].outputs[0].text for p in arguments.prompt]
    print(json.dumps({"outputs": outputs, "fingerprints": fingerprints(llm)}), flush=True)


if __name__ == "__main__":
    main()
