"""Nothing that comes from outside is unpickled or evaluated: looked for in the syntax of every shipped module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ROOTS = ("protos", "transports", "worker_client", "coordinator")
SHIPPED = sorted(path for root in ROOTS for path in (REPO / root).rglob("*.py"))

# Modules whose loading runs code, or that are only good for that.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
# Also as a method: numpy.load(allow_pickle=True) and pandas.read_pickle are caught by their words below.
BUILTINS = {"eval", "exec", "compile", "__import__"}
WORDS = {"allow_pickle", "read_pickle", "unsafe_load", "full_load", "trust_remote_code"}
LOADS = {"torch.load", "numpy.load", "np.load"}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (f"import {name.name}" for name in names if name.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield f"from {module}"
            case ast.Call(func=ast.Name(id)) if id in BUILTINS:
                yield f"{id}()"
            case ast.Call(func=ast.Attribute(ast.Name("builtins"), name)) if name in BUILTINS:
                yield f"builtins.{name}()"
            case ast.Call(func=ast.Attribute() as function, keywords=words) if ast.unparse(function) in LOADS:
                safe = any(w.arg == "weights_only" and ast.unparse(w.value) == "True" for w in words)
                if not safe:
                    yield f"{ast.unparse(function)}() without weights_only=True"
            case ast.keyword(arg=str(word)) | ast.Attribute(attr=word) | ast.Name(id=word) if word in WORDS:
                yield word
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name("import_module"), args=[name, *_]):
                if isinstance(name, ast.Constant) and str(name.value).partition(".")[0] in MODULES:
                    yield f"import_module({name.value!r})"
            case _:
                pass


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPO)))
def test_no_shipped_module_unpickles_or_evaluates_anything(path: Path) -> None:
    # The stubs that protoc makes are looked at too: they evaluate nothing either.
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import numpy, dill.source",
        "from marshal import loads",
        "from yaml import safe_load",
        "eval('1')",
        "exec(text)",
        "builtins.exec(text)",
        "compile(a, b, 'exec')",
        "__import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "reader(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "load_model(trust_remote_code=True)",
        "importlib.import_module('pickle')",
    ],
)
def test_what_it_looks_for_is_found(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "re.compile('x')", "model.eval()"])
def test_what_is_harmless_is_not(source: str) -> None:
    assert not list(offences(source))
