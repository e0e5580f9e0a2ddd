"""Runs a sitting: a document's own lines in a real shell, with real commands, in a home and on ports of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.agents import end_agent

from hotweights.worker_client.config import load_config

from .blocks import REPO, Block
from .table import Sitting

HERE = Path(__file__).parent
DEADLINE_S = 240.0
LIVE_DEADLINE_S = 800.0
END_S = 30.0
# Small and quick, on a port of its own.
_LIVE_ARGUMENTS = "--enforce-eager --dtype bfloat16 --max-model-len 256 --host 127.0.0.1 --port"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Home:
    """What a sitting may write; the documents' port and folders become those of this one."""

    def __init__(self, folder: Path, make_model: Callable[[Path, int], object]) -> None:
        self.folder = folder
        self.port = free_port()
        self.stage = (
            Path("/dev/shm" if sys.platform == "linux" else folder) / f"hotweights-docs-{os.getpid()}-{self.port}"
        )
        for number, name in enumerate(("v1", "v2"), start=1):
            make_model(folder / "models" / name, number)

    def environment(self, *, live: bool) -> Mapping[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOTWEIGHTS_")}
        path = (str(Path(sys.executable).parent), str(REPO / ".venv-tools" / "bin"), os.environ["PATH"])
        return {
            **inherited,
            "PATH": os.pathsep.join(path),
            "HOME": str(self.folder),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "HOTWEIGHTS_STAGE_DIR": str(self.stage),
            "HOTWEIGHTS_NODE": "here",
            "HOTWEIGHTS_ENDPOINT": f"tcp://127.0.0.1:{self.port}",
            "LOGS": str(self.folder),
            "ENGINE": "" if live else str(HERE / "stand_in_engine.py"),
            "ENGINE_ARGUMENTS": f"{_LIVE_ARGUMENTS} {free_port()}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def here(self, text: str) -> str:
        """The document's lines, for this home."""
        moved = text.replace("5555", str(self.port))
        return moved.replace("/models/", f"{self.folder}/models/").replace("/tmp/walk", f"{self.folder}/walk")

    def close(self) -> None:
        """Ends the agent that the commands started, and removes its stage."""
        end_agent(load_config({"HOTWEIGHTS_STAGE_DIR": str(self.stage)}))
        shutil.rmtree(self.stage, ignore_errors=True)


def run_sitting(sitting: Sitting, blocks: list[Block], home: Home, *, live: bool = False) -> str:
    """What it printed. Raises AssertionError with all of it when a line fails."""
    lines = [(HERE / "sitting.sh").read_text(), home.here(sitting.before)]
    for block in blocks:
        if block.language == "python":
            program = home.folder / "block.py"
            program.write_text(sitting.python + home.here(block.text))
            lines.append(f"command python {program}")
        else:
            lines.append(home.here(block.text))
    script = home.folder / "sitting.bash"
    script.write_text("\n".join([*lines, sitting.after, ""]))
    code, said = run_bash(script, home.environment(live=live), LIVE_DEADLINE_S if live else DEADLINE_S)
    assert code == 0, f"{sitting.name} ended with {code}:\n{said[-6000:]}"
    return said


def run_bash(script: Path, environment: Mapping[str, str], deadline_s: float) -> tuple[int, str]:
    """Exit code and output. What it started goes with it when its time is over: all of it is of one group."""
    shell = subprocess.Popen(
        ["bash", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        env=environment,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            shell.communicate(timeout=END_S)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(END_S)
    return shell.returncode, said
