"""An offline LLM that follows updates while its own thread generates.

    python offline.py FOLDER ENDPOINT MODEL PROMPT... < a line ends it

Prints one JSON line for each batch: the outputs, and the version that was active when they were asked for.
"""

import json
import sys
import threading

from oracle import MAX_TOKENS
from tests import warm

from hotweights.adapters.vllm_auto import install_autobind


def main() -> None:
    folder, endpoint, model, *prompts = sys.argv[1:]
    warm.begin_if_asked()
    install_autobind(endpoint=endpoint, model=model)
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=True, max_model_len=256, dtype="bfloat16")
    ended = threading.Event()

    def wait_for_a_line() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=wait_for_a_line, daemon=True).start()
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    while not ended.is_set():
        version = llm.llm_engine.hotweights_agent.active_version
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        outputs = [answer.outputs[0].text for answer in answers]
        print(json.dumps({"version": version, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    main()
