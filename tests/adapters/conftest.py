"""One engine for all tests that swap on one rank: it takes a minute to start. Each test leaves it serving v1.

`test_vllm_torn.py`, the last in the order of names, tears it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.models import make_checkpoint

from .live_engine import LiveEngine, Oracle, fresh_oracle


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, seed) for name, seed in (("v1", 1), ("v2", 2))}


@pytest.fixture(scope="session")
def v2(folders: dict[str, Path]) -> Oracle:
    return fresh_oracle(folders["v2"])


@pytest.fixture(scope="session")
def engine(folders: dict[str, Path], v2: Oracle) -> Iterator[LiveEngine]:
    engine = LiveEngine(folders["v1"])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def v1(engine: LiveEngine) -> Oracle:
    """Asked before anything was swapped: this engine is freshly started too."""
    return engine.oracle()
