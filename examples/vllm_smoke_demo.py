"""The smallest update there is: new weights for an nn.Linear, without vLLM and without a GPU.

    python examples/vllm_smoke_demo.py
    python examples/vllm_smoke_demo.py --use-coord --endpoint tcp://127.0.0.1:5555

Without --use-coord the toy version is read from a folder. With it the version is published through this node's agent
(started when none runs), staged, and pulled by `HotweightsWorkerExtension` as a trainer and a worker would.
"""

import argparse
import asyncio
import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hotweights.adapters.settings import settings
from hotweights.adapters.vllm_extension import HotweightsWorkerExtension
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.config import Config

MODEL = "smoke-demo"


def make_version(folder: Path, seed: int) -> str:
    """Writes a toy checkpoint for nn.Linear(64, 32) and names it after its content."""
    torch.manual_seed(seed)
    path = folder / "model.safetensors"
    save_file({"weight": torch.randn(32, 64), "bias": torch.randn(32)}, path)
    return f"toy-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


async def publish(config: Config, folder: Path, version: str) -> None:
    """Hands the folder to this node's agent; returns when the version is durable in the coordinator."""
    from hotweights.worker_client.agent_client import connect_or_start

    agent = await connect_or_start(config)
    try:
        await agent.publish_folder(folder, MODEL, version)
    finally:
        await agent.close()


def matches(module: torch.nn.Module, folder: Path) -> bool:
    """Whether every live tensor has exactly the bytes of the checkpoint's."""
    expected = load_file(folder / "model.safetensors")
    live = module.state_dict()
    return live.keys() == expected.keys() and all(torch.equal(live[name], expected[name]) for name in expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use-coord", action="store_true", help="publish and pull through a coordinator")
    parser.add_argument("--endpoint", help="the coordinator; HOTWEIGHTS_ENDPOINT when it is not given")
    parser.add_argument("--seed", type=int, default=7, help="of the toy version")
    arguments = parser.parse_args()

    module = torch.nn.Linear(64, 32)
    extension = HotweightsWorkerExtension(endpoint=arguments.endpoint, model=MODEL)
    extension.bind_module(module)
    with tempfile.TemporaryDirectory(prefix="hotweights-smoke-") as name:
        folder = Path(name)
        version = make_version(folder, arguments.seed)
        print(f"version {version}: made in {folder}; matches before: {matches(module, folder)}")
        if arguments.use_coord:
            config = settings(arguments.endpoint, MODEL)
            asyncio.run(publish(config, folder, version))
            print(f"version {version}: published to {config.endpoint}")
            applied = extension.apply_update()
            print(f"version {applied.version}: pulled and applied")
        else:
            applied = extension.apply_update(folder=folder)
            print(f"version {version}: applied from the folder")
        print(f"fingerprint of the live tensors: {applied.fingerprint.hex()[:16]}")
        matched = matches(module, folder)
    print(f"Applied weights match expected: {matched}")
    return 0 if matched else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HotweightsError as error:
        sys.exit(f"vllm_smoke_demo: {error}")
