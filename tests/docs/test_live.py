"""The documents' live sittings with a real vLLM, and `make demo`: minutes each, so not in every run."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.models import make_checkpoint

from .blocks import REPO, all_blocks
from .sittings import LIVE_DEADLINE_S, Home, run_sitting
from .table import SITTINGS, Sitting

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
LIVE = [sitting for sitting in SITTINGS if sitting.live]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path, lambda folder, seed: make_checkpoint(folder, seed))
    yield home
    home.close()


@pytest.mark.parametrize("sitting", LIVE, ids=lambda sitting: sitting.name)
def test_the_blocks_swap_the_weights_of_a_real_engine_and_go_back(sitting: Sitting, home: Home) -> None:
    blocks = [block for block in all_blocks() if block.document == sitting.document]
    wanted = [block for first in sitting.blocks for block in blocks if block.commands[0] == first]
    said = run_sitting(sitting, wanted, home, live=True)
    assert said.count("committed") >= 2, said  # there and back


def test_make_demo_says_that_all_went_well() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "demo"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=LIVE_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
