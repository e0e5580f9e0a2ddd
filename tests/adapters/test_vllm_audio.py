"""A multimodal engine: what an encoder put out is of the weights it was computed with, and kept between requests.

The two versions differ in their audio encoder alone: whoever still uses an old output is not told by anything else.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.live_engine import LiveEngine, Tokens
from tests.adapters.swaps import prepare_all, window
from tests.audio_model import make_audio_checkpoint

from hotweights.worker_client.window.window import Outcome

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.capability("encoder caches"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

RATE = 16_000


def heard(engine: LiveEngine) -> Tokens:
    """Greedy tokens after each of two sounds of a second: a tone, and noise."""
    import numpy as np

    sounds = (np.sin(np.arange(RATE) * 0.05), np.random.default_rng(1).normal(size=RATE))

    async def answers() -> Tokens:
        said = []
        for sound in sounds:
            prompt: Any = {
                "prompt": "<|audio_bos|> <|AUDIO|> <|audio_eos|> t5 t6 t7",
                "multi_modal_data": {"audio": [(sound.astype(np.float32), RATE)]},
            }
            said.append(await engine.answer(prompt))
        return said

    return engine.call(answers())


def test_sounds_heard_before_a_swap_are_encoded_anew_after_it_and_after_the_way_back(tmp_path: Path) -> None:
    one, two = (make_audio_checkpoint(tmp_path / f"v{ears}", ears) for ears in (1, 2))
    fresh = LiveEngine(two)
    try:
        after = heard(fresh)
    finally:
        fresh.close()
    engine = LiveEngine(one)
    try:
        before = heard(engine)
        assert all(old != new for old, new in zip(before, after, strict=True))
        fingerprints = prepare_all(engine, two)
        refused = window(engine, str(two), fingerprints, "keep")
        assert (refused.outcome, "text models only" in refused.reason) == (Outcome.UNDONE, True), refused
        assert heard(engine) == before
        fingerprints = prepare_all(engine, two)
        assert window(engine, str(two), fingerprints).outcome is Outcome.APPLIED
        assert heard(engine) == after
        assert window(engine, "", fingerprints).outcome is Outcome.APPLIED
        assert heard(engine) == before
    finally:
        engine.close()
