"""A whole fleet on one machine: coordinator, agent and an OpenAI server, as processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from live_processes import answers, free_port, leave_a_core  # noqa: E402
from oracle import MAX_TOKENS  # noqa: E402
from tests.agents import agent_pid, end_agent  # noqa: E402

from hotweights.worker_client.config import load_config  # noqa: E402

ENGINE_DEADLINE_S = 280.0
WAIT_S = 60.0
MODEL = "walk"
REPLICA = "engine-1"
PROMPTS_CHECKED = 3


def wait_for(what: str, probe: Callable[[], Any], deadline_s: float = WAIT_S) -> Any:
    """The first true answer of a probe."""
    ends = time.monotonic() + deadline_s
    while time.monotonic() < ends:
        if value := probe():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {deadline_s:.0f} s")


def await_stopped(pid: int) -> None:
    """Until a process is stopped (SIGSTOP)."""
    stat = Path(f"/proc/{pid}/stat")
    wait_for(f"process {pid} stopped", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")


class Fleet:
    """What a test drives; every process is ended by its id."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.coordinator_port, self.api_port = free_port(), free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.coordinator_port}"
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.stage = Path("/dev/shm") / f"hotweights-test-{os.getpid()}"
        self.prompts: list[str] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "HOTWEIGHTS_ENDPOINT": self.endpoint,
            "HOTWEIGHTS_MODEL": MODEL,
            "HOTWEIGHTS_REPLICA": REPLICA,
            "HOTWEIGHTS_NODE": "node-1",
            "HOTWEIGHTS_STAGE_DIR": str(self.stage),
            "HOTWEIGHTS_AGENT_SOCKET": str(self.stage / "agent.sock"),
            "HOTWEIGHTS_BUCKET_BYTES": "65536",
            "HOTWEIGHTS_FAILPOINTS": f"@{folder / 'failpoints'}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",  # what is looked for in its log
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", "")))),
        }

    def start(self, name: str, arguments: Sequence[str], **environment: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._running[name] = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**self.environment, **environment},
            start_new_session=True,
        )
        log.close()

    def start_server(
        self,
        name: str,
        checkpoint: Path,
        port: int,
        *options: str,
        model: str = MODEL,
        extension: str = "failpoints_by_http.FailpointsByHttp",
        **environment: str,
    ) -> None:
        """vLLM's OpenAI server, with quicker imports (tests/warm.py)."""
        # fmt: off
        self.start(name, [
            "vllm_serve", "serve", str(checkpoint), "--served-model-name", model,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager",
            "--max-model-len", "256", "--worker-extension-cls", extension, *options,
        ], TEST_WARM="1", **environment)
        # fmt: on

    def start_all(self, checkpoints: Mapping[str, Path]) -> None:
        """Coordinator, agent and engine; the versions are published, and v1, which the engine serves, is committed."""
        self.start_coordinator()
        self.start_agent()
        self.start_engine()
        for name, folder in checkpoints.items():
            self.json("publish", str(folder), "--model", MODEL, "--version", name)
        # The engine serves v1 already: this commits it without a window.
        assert self.json("update", "v1")["phase"] == "UPDATE_PHASE_COMMITTED"

    def start_coordinator(self, *options: str, store: Path | None = None) -> None:
        kept = f"sqlite:{store or self.folder / 'coordinator.db'}"
        serve = ["hotweights.cli", "coord-serve", "--endpoint", self.endpoint, "--store", kept]
        self.start("coordinator", [*serve, *options])
        wait_for("the coordinator", self._coordinator_answers)

    def _coordinator_answers(self) -> bool:
        return self.command("coord-status", "--json").returncode == 0

    def start_agent(self) -> None:
        """The fleet's own: the engine starts one itself when it misses it, at any moment, and then ours gives way."""
        config = load_config(self.environment)

        def ours_answers() -> bool:
            if "agent" not in self._running or not self.runs("agent"):
                end_agent(config)
                self.start("agent", ["hotweights.cli", "agent"])
            return agent_pid(config) == self.pid("agent")

        wait_for("the agent", ours_answers)
        wait_for("the agent's node", lambda: any(n.get("connected") for n in self.status().get("nodes", [])))

    def start_engine(self) -> None:
        self.start_server("engine", self.checkpoint, self.api_port)
        wait_for("the engine", self._engine_answers, ENGINE_DEADLINE_S)
        leave_a_core(self.pid("engine"))
        wait_for("the replica", lambda: self.replica().get("active_digest"))

    def _engine_answers(self) -> bool:
        assert self._running["engine"].poll() is None, (self.folder / "engine.log").read_text()[-4000:]
        return answers(f"{self.url}/health")

    def process(self, name: str) -> "subprocess.Popen[bytes]":
        return self._running[name]

    def kill(self, name: str) -> None:
        """SIGKILL, as a machine or the kernel's memory killer does it."""
        process = self._running.pop(name)
        process.kill()
        process.wait(WAIT_S)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def store_mib(self) -> float:
        """The coordinator's database with its write-ahead log."""
        return sum(path.stat().st_size for path in self.folder.glob("coordinator.db*")) / (1 << 20)

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to one process, not to its children."""
        self._running[name].send_signal(number)

    def runs(self, name: str) -> bool:
        return self._running[name].poll() is None

    def await_end(self, name: str, deadline_s: float = WAIT_S) -> int:
        """The exit code of a process that ends by itself, or by a failpoint; negative for a signal."""
        code = self._running[name].wait(deadline_s)
        del self._running[name]
        return code

    def await_stop(self, name: str) -> None:
        """Until a process has stopped itself (SIGSTOP)."""
        await_stopped(self._running[name].pid)

    def fail_at(self, failpoints: str) -> None:
        """Sets failpoints of the coordinator, the agent and the controller, which follow the file."""
        fresh = self.folder / "failpoints.new"
        fresh.write_text(failpoints)
        fresh.replace(self.folder / "failpoints")

    def close(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(WAIT_S)

    # Asking.

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        """A command that is not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", "hotweights.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def command(self, *arguments: str, deadline_s: float = WAIT_S) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "hotweights.cli", *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=deadline_s,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        done = self.command(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self) -> Any:
        return self.json("coord-status")

    def replica(self) -> Any:
        return next((r for r in self.status().get("replicas", []) if r["id"] == REPLICA), {})

    def everybody_is_here(self) -> bool:
        """Agent and replica: each comes back to a new coordinator in its own time."""
        agents = [node for node in self.status().get("nodes", []) if node.get("connected")]
        return bool(agents and self.replica().get("connected"))

    def last_update(self) -> Any:
        updates = self.json("coord-status").get("updates", [])
        return max(updates, key=lambda update: update["started_at"])

    def wait_for_phase(self, update_id: str, phase: str) -> Any:
        def reached() -> Any:
            update = next((u for u in self.status()["updates"] if u["id"] == update_id), None)
            return update if update and update["phase"] == f"UPDATE_PHASE_{phase}" else None

        return wait_for(f"{update_id} in {phase}", reached)

    def inject(self, failpoints: str) -> None:
        """Sets failpoints in the worker, between two windows."""
        body = json.dumps({"method": "inject_failpoints", "args": [failpoints]}).encode()
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            assert response.status == 200

    def outputs(self) -> list[str]:
        """Greedy outputs of the serving engine."""
        return [complete(self.url, MODEL, prompt) for prompt in self.prompts]


def complete(url: str, model: str, prompt: str) -> str:
    """What a server answers, greedily."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        text: str = json.loads(response.read())["choices"][0]["text"]
        return text
