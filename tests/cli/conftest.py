"""Real processes: a coordinator started through the command line on port 0, and this node's agent."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from .processes import Node, Serving, start_agent, start_coordinator, stop


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A stage of its own: sockets want short paths, so not pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="hw-cli-"))
    yield Node(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def serving(node: Node) -> Iterator[Serving]:
    """A coordinator on SQLite, and its node's commands."""
    serving = start_coordinator(node, "--store", f"sqlite:{node.folder / 'coordinator.db'}")
    yield serving
    assert stop(serving.process) == 0, serving.log()


@pytest.fixture(scope="module")
def agent(serving: Serving) -> Iterator[Serving]:
    """The same with an agent in the foreground."""
    process = start_agent(serving)
    yield serving
    assert stop(process) == 0


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny folders of the same tensors with other values."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number, name in enumerate(("v1", "v2", "v3"), start=1):
        (root / name).mkdir()
        tensors = {"a.weight": np.full((64, 32), number, np.float32), "b": np.arange(10, dtype=np.float32)}
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text("{}")
    return {name: root / name for name in ("v1", "v2", "v3")}
