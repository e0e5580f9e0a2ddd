"""The main job, live: a version swapped into a serving vLLM engine under traffic, and rolled back.

    coordinator   agent   OpenAI server (vLLM) on v1   clients that stream all the time
        publish v2 -> staged -> applied in a window of milliseconds -> checked -> rolled back

`make demo` runs it. It exits non-zero unless every check holds.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from live_processes import (
    ENGINE_DEADLINE_S,
    START_DEADLINE_S,
    DemoFailed,
    Processes,
    answers,
    free_port,
    leave_a_core,
)
from live_traffic import Traffic
from oracle import MAX_TOKENS, clear_prompts
from random_llama import make_checkpoint

MODEL = "demo"
PROMPTS = [f"t{n} t{n + 9} t{2 * n}" for n in range(5, 245, 5)]
PROMPTS_CHECKED = 4
UPDATE_DEADLINE_S = 180.0
HERE = Path(__file__).resolve().parent


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Demo:
    """One run, in a folder of its own."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        self.size = size
        self.coordinator_port, self.api_port = free_port(), free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.coordinator_port}"
        self.url = f"http://127.0.0.1:{self.api_port}/v1"
        self.stage = Path("/dev/shm" if Path("/dev/shm").is_dir() else folder) / f"hotweights-{folder.name}"
        self.oracles: dict[str, Any] = {}
        self.prompts: list[str] = []
        self.processes = Processes(folder, self._environment())

    def _environment(self) -> dict[str, str]:
        return {
            "HOTWEIGHTS_ENDPOINT": self.endpoint,
            "HOTWEIGHTS_MODEL": MODEL,
            "HOTWEIGHTS_REPLICA": "demo-engine",
            "HOTWEIGHTS_STAGE_DIR": str(self.stage),
            "HOTWEIGHTS_AGENT_SOCKET": str(self.stage / "agent.sock"),
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "HF_HUB_OFFLINE": "1",
        }

    # Parts.

    def make_checkpoints(self) -> None:
        for number, name in enumerate(("v1", "v2"), start=1):
            make_checkpoint(self.folder / name, number, self.size)
        size = (self.folder / "v1" / "model.safetensors").stat().st_size
        say(f"two random Llama checkpoints of {size / 1e6:.0f} MB: v1, v2")

    def ask_oracles(self) -> None:
        for name in ("v1", "v2"):
            prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
            script = [str(HERE / "oracle.py"), str(self.folder / name), *prompts]
            self.oracles[name] = self.processes.run_json(script, ENGINE_DEADLINE_S)
            say(f"a fresh engine on {name} answered {len(PROMPTS)} prompts and showed its parameters")
        self.prompts = clear_prompts(PROMPTS, list(self.oracles.values()), PROMPTS_CHECKED)

    def start_fleet(self) -> None:
        store = f"sqlite:{self.folder / 'coordinator.db'}"
        serve = ["coord-serve", "--endpoint", self.endpoint, "--store", store]
        self.processes.start("coordinator", ["hotweights.cli", *serve])
        self.processes.wait_until("coordinator", self._coordinator_answers, START_DEADLINE_S)
        say(f"coordinator at {self.endpoint}")
        self.processes.start("agent", ["hotweights.cli", "agent"])
        self.processes.wait_until("agent", self._agent_attached, START_DEADLINE_S)
        say(f"agent on this node, images staged in {self.stage}")
        # fmt: off
        engine = self.processes.start("engine", [
            "vllm.entrypoints.openai.api_server", "--model", str(self.folder / "v1"),
            "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.api_port),
            "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256",
        ])
        # fmt: on
        ready = self.url.removesuffix("/v1") + "/health"
        self.processes.wait_until("engine", lambda: answers(ready), ENGINE_DEADLINE_S)
        leave_a_core(engine)
        say(f"vLLM serves v1 at {self.url}")

    def _coordinator_answers(self) -> bool:
        try:
            self.hotweights("coord-status", "--json")
        except DemoFailed:
            return False
        return True

    def _agent_attached(self) -> bool:
        return any(node.get("connected") for node in self.status().get("nodes", []))

    def hotweights(self, *arguments: str, deadline_s: float = 60.0) -> Any:
        return self.processes.run_json(["-m", "hotweights.cli", *arguments], deadline_s)

    def status(self) -> Any:
        return self.hotweights("coord-status", "--json")

    def replica(self) -> Any:
        return next((r for r in self.status().get("replicas", []) if r["id"] == "demo-engine"), {})

    def wait_for_replica(self) -> None:
        ends = time.monotonic() + START_DEADLINE_S
        while not self.replica().get("active_digest"):
            if time.monotonic() > ends:
                raise DemoFailed(f"the engine did not register within {START_DEADLINE_S:.0f} s")
            time.sleep(0.3)

    def publish(self, version: str, *flags: str) -> Any:
        folder = str(self.folder / version)
        return self.hotweights("publish", folder, "--model", MODEL, "--version", version, "--json", *flags)

    def outputs(self) -> list[str]:
        """Greedy outputs of the serving engine, one prompt at a time."""
        from openai import OpenAI

        with OpenAI(base_url=self.url, api_key="none", max_retries=0) as client:
            return [
                client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=MAX_TOKENS,
                    temperature=0.0,
                    extra_body={"ignore_eos": True},
                )
                .choices[0]
                .text
                for prompt in self.prompts
            ]

    def matches(self, version: str) -> bool:
        """Outputs and live parameters equal those of an engine freshly started on the version."""
        oracle, replica = self.oracles[version], self.replica()
        expected = [oracle["outputs"][PROMPTS.index(prompt)] for prompt in self.prompts]
        same_outputs = self.outputs() == expected
        same_parameters = replica.get("fingerprints") == oracle["fingerprints"]
        same_version = replica.get("active_version") == version
        if not (same_outputs and same_parameters and same_version):
            say(f"outputs equal: {same_outputs}, parameters equal: {same_parameters}, ")
            say(f"version serving: {replica.get('active_version')}, wanted {version}")
        return bool(same_outputs and same_parameters and same_version)

    # The story.

    def swap(self, traffic: Traffic) -> bool:
        begun = time.monotonic()
        self.publish("v2")
        update = self.hotweights("update", "v2", "--model", MODEL, "--json", deadline_s=UPDATE_DEADLINE_S)
        ended = time.monotonic()
        window = self.replica()["last_window"]
        tokens = traffic.seen.tokens_between(begun, ended)
        say(f"v2 published, staged and applied in {ended - begun:.1f} s: {update['phase']}")
        say(f"tokens served meanwhile: {tokens}")
        say(_pause_line(window))
        return bool(update["phase"] == "UPDATE_PHASE_COMMITTED" and tokens > 0)

    def roll_back(self) -> bool:
        begun = time.monotonic()
        update = self.hotweights("rollback", "--model", MODEL, "--json", deadline_s=UPDATE_DEADLINE_S)
        say(f"rolled back in {time.monotonic() - begun:.1f} s: {update['phase']}")
        say(_pause_line(self.replica()["last_window"]))
        return bool(update["phase"] == "UPDATE_PHASE_COMMITTED")

    def run(self) -> bool:
        self.make_checkpoints()
        self.ask_oracles()
        with self.processes:
            self.start_fleet()
            self.wait_for_replica()
            self.publish("v1")
            say("v1 published: the engine's own folder is a known version now")
            traffic = Traffic(self.url, MODEL, clients=4)
            traffic.start()
            time.sleep(3.0)
            first = self.matches("v1")
            swapped = self.swap(traffic)
            applied = self.matches("v2")
            say(f"Applied weights match expected: {applied}")
            went_back = self.roll_back()
            restored = self.matches("v1")
            say(f"Rolled back, outputs equal v1: {restored}")
            traffic.stop()
            seen = traffic.seen
            say(f"requests: {seen.requests}, failed: {len(seen.failures)}, tokens: {len(seen.token_times)}")
            for failure in seen.failures[:5]:
                say(f"  {failure}")
        return all((first, swapped, applied, went_back, restored, not seen.failures))


def _pause_line(window: dict[str, float]) -> str:
    quiesce, apply, resume = (window.get(f"{part}_ms", 0.0) for part in ("quiesce", "apply", "resume"))
    return f"pause {quiesce + apply + resume:.1f} ms: quiesce {quiesce:.1f}, apply {apply:.1f}, resume {resume:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="demo", help="tiny, small, demo (100 MB) or large (890 MB)")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and logs")
    arguments = parser.parse_args()
    try:
        import vllm  # noqa: F401
    except ImportError:
        print("the live demo needs vLLM: make setup, or pip install '.[vllm]'", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="hotweights-demo-"))
    demo = Demo(folder, arguments.size)
    passed = False
    try:
        passed = demo.run()
    except DemoFailed as error:
        say(f"failed: {error}")
    finally:
        shutil.rmtree(demo.stage, ignore_errors=True)
        if arguments.keep or not passed:
            say(f"checkpoints and logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say(json.dumps({"passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
