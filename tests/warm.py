"""Processes of real engines without the wait for imports: forked from one that has imported vLLM already.

    pytest --starts--> fork server: torch and vLLM imported, one thread, no engine --forks--> cores, ranks, scripts

vLLM starts each core and each rank with "spawn", which imports torch and vLLM anew: twenty seconds of processor time on
a slow machine, three times an engine. In tests all those of one pytest share one import. What is forked has the
environment of whoever starts it, as with "spawn". Servers that tests start as commands (`vllm serve`) are not touched,
but for those with TEST_WARM set.
"""

import multiprocessing.forkserver
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What an engine's processes import; the last makes "spawn" mean this in them too.
PRELOADED = (
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.openai.api_server",
    "tests.warm_child",
)
_server: Any = multiprocessing.forkserver._forkserver


class WarmProcess(ForkServerProcess):
    """Has the environment that its parent has when it starts it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        _start_server()
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        _bind_threads()
        super().run()


class WarmContext(ForkServerContext):
    Process = WarmProcess


def use() -> None:
    """From here on what this process starts of vLLM is forked; call it as often as you like."""
    from vllm.utils import system_utils
    from vllm.v1 import utils

    for module in (system_utils, utils):  # cores and ranks; API servers
        module.multiprocessing = SimpleNamespace(get_context=lambda method: WarmContext())
    look_at_classes_here()


def look_at_classes_here() -> None:
    """vLLM asks a process of its own, which imports all of it, about each model class that its cache does not know."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def _bind_threads() -> None:
    """As OpenMP does when a process begins, by what vLLM set for it: here it began with the fork server."""
    import torch

    if count := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(count))
    places = os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", "")
    if cores := {int(number) for number in re.findall(r"\d+", places)}:
        os.sched_setaffinity(0, cores)


def be_a_child() -> None:
    """In the fork server: what it forks asks it for more. Python would start another server for each of them."""
    _server.ensure_running = lambda: None


def begin_if_asked() -> None:
    """For a program that a test starts with TEST_WARM set: its engines are forked from a server of its own.

    Which imports what they need beside the program, on another core; it is of the program's session and process group.
    """
    if os.environ.get("TEST_WARM"):
        _start_server()
        use()


def run(script: Path, *arguments: str, deadline_s: float) -> "subprocess.CompletedProcess[str]":
    """As `python SCRIPT ARGUMENTS`, of a script that starts an engine."""
    with TemporaryDirectory() as told:
        streams = Path(told) / "stdout", Path(told) / "stderr"
        process = WarmContext().Process(target=_script, args=(script, arguments, *streams))
        process.start()
        process.join(deadline_s)
        if process.is_alive():
            process.kill()
            process.join(10)
            raise subprocess.TimeoutExpired([str(script), *arguments], deadline_s)
        stdout, stderr = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode or 0, stdout, stderr)


def _script(script: Path, arguments: tuple[str, ...], stdout: Path, stderr: Path) -> None:
    for number, stream in ((1, stdout), (2, stderr)):
        opened = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def _start_server() -> None:
    """Once; a forked process has that of its parent."""
    if _server._forkserver_address is not None:
        return
    multiprocessing.forkserver.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
        patch.setenv("VLLM_LOGGING_LEVEL", os.environ.get("TEST_VLLM_LOGGING", "ERROR"))
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # its threads would not be in what is forked
        patch.setenv("LD_PRELOAD", os.pathsep.join(_preloaded_libraries()))
        multiprocessing.forkserver.ensure_running()


def _preloaded_libraries() -> list[str]:
    """As vLLM's CPU platform has them loaded in what it spawns."""
    found = []
    for package, pattern in (("torch", "lib/libgomp*.so*"), ("vllm", "libs/libtcmalloc*.so*")):
        spec: Any = find_spec(package)
        found += sorted(str(path) for path in Path(spec.origin).parent.glob(pattern))[:1]
    return found
