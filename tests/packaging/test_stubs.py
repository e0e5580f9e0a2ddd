"""The committed stubs import on every protobuf that vLLM may bring: a newer generator would refuse the older ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
STUBS = sorted(path.stem for path in (REPO / "protos/hotweights/v1").glob("*_pb2*.py"))
GRPCIO = {"5.29.6": "1.71.2", "6.33.5": "1.80.0"}  # one of the same age


@pytest.mark.registry
@pytest.mark.parametrize("protobuf", ["5.29.6", "6.33.5", "newest"])
def test_stubs_import_under_protobuf(protobuf: str, tmp_path: Path) -> None:
    pins = ["protobuf", "grpcio"] if protobuf == "newest" else [f"protobuf=={protobuf}", f"grpcio=={GRPCIO[protobuf]}"]
    # pip keeps what it fetched, and is configured where a machine needs a mirror.
    install = [sys.executable, "-m", "pip", "install", "-qq", "--target", str(tmp_path), *pins]
    subprocess.run(install, check=True, timeout=240)
    ran = subprocess.run(
        [
            sys.executable,
            "-S",
            "-W",
            "error",
            "-c",
            "; ".join(f"import hotweights.v1.{name}" for name in STUBS),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO / "protos")])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert STUBS
    assert ran.returncode == 0, ran.stderr
