"""The checkpoints of the tests: made by the examples' maker, imported by path because examples/ is no package."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "hotweights_examples_random_llama", Path(__file__).parents[1] / "examples" / "random_llama.py"
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

make_checkpoint = _module.make_checkpoint

__all__ = ["make_checkpoint"]
