"""What the README says of installing, in an environment that has nothing yet."""

import subprocess
import venv
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.registry, pytest.mark.timeout(600)]
INSTALL_DEADLINE_S = 400.0


class Environment:
    """A venv; `python` and its programs are run by path."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self._programs = folder / "bin"

    def run(self, program: str, *arguments: str, deadline_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        command = [str(self._programs / program), *arguments]
        return subprocess.run(
            command, cwd=REPO, capture_output=True, text=True, timeout=deadline_s, check=False, stdin=subprocess.DEVNULL
        )

    def install(self, what: str) -> None:
        done = self.run("pip", "install", "--quiet", "--no-compile", what, deadline_s=INSTALL_DEADLINE_S)
        assert done.returncode == 0, done.stderr

    def imports(self, *modules: str) -> bool:
        return self.run("python", "-c", f"import {', '.join(modules)}").returncode == 0

    def finds(self, module: str) -> bool:
        """Whether it is installed; it need not load."""
        found = self.run("python", "-c", f"import importlib.util as u; print(u.find_spec({module!r}) is not None)")
        return found.stdout == "True\n"


def test_each_way_to_install_brings_what_it_says_and_no_torch(tmp_path: Path) -> None:
    told = (REPO / "README.md").read_text()
    assert all(f"pip install {what}" in told for what in (".", "'.[coordinator]'", "'.[extras]'"))
    here = Environment(tmp_path)

    here.install(".")
    assert here.run("hotweights", "--version").stdout.startswith("hotweights ")
    assert here.imports("hotweights.publish", "hotweights.worker_client", "hotweights.transports")
    refused = here.run("hotweights", "coord-serve", "--endpoint", "tcp://127.0.0.1:0", "--store", "memory:")
    assert refused.returncode == 1
    assert "pip install 'hotweights[coordinator]'" in refused.stderr

    here.install(".[coordinator]")
    assert here.imports("hotweights.coordinator.server")

    here.install(".[extras]")
    assert here.finds("mpi4py")  # which loads only where an MPI is
    assert not any(here.finds(module) for module in ("torch", "vllm", "transformers"))
    assert here.run("pip", "check").returncode == 0
