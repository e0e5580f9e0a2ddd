"""Publishing a live module: its state written as a checkpoint folder, then published like any other.

state_dict --write_module--> folder/model.safetensors --publish_folder--> version
           --lend_module---> the same in GPU memory, for engines of this node
"""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hotweights.publish.folder import Progress, publish_folder_async
from hotweights.publish.lending import LEASE_S_MAX, Loan, lend_module
from hotweights.v1 import model_pb2, update_pb2
from hotweights.wire.errors import Refused
from hotweights.worker_client.agent_client import connect_or_start
from hotweights.worker_client.config import Config, load_config

WEIGHTS = "model.safetensors"


def write_module(state: Mapping[str, Any], folder: Path, *, files: Mapping[str, bytes] | None = None) -> Path:
    """Writes a state dict (torch tensors, or what numpy takes as arrays) as a safetensors folder.

    `folder` must not have weights yet: a folder that is being served must never change. `files` ride along
    (config.json, for an engine to load the version from disk). Raises FileExistsError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS
    if target.exists():
        raise FileExistsError(f"{target} is there already; give every version a folder of its own")
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    unfinished = folder / f".{WEIGHTS}"
    if any(hasattr(value, "detach") for value in state.values()):
        _save_torch(state, unfinished)
    else:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, unfinished)
    unfinished.replace(target)
    return folder


def _save_torch(state: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file  # imports torch: only here, only for torch's tensors

    seen: set[int] = set()
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # tied weights: each name gets bytes of its own
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    save_file(tensors, path)


async def publish_module_async(
    state: Mapping[str, Any],
    *,
    model: str,
    version: str,
    folder: Path | None = None,
    files: Mapping[str, bytes] | None = None,
    config: Config | None = None,
    start_update: bool = False,
    options: update_pb2.UpdateOptions | None = None,
    progress: Progress | None = None,
    wait_copies: int = 0,
    wait_s: float = 600.0,
    lend: bool | None = None,
    lease_s: float = 600.0,
) -> model_pb2.Version:
    """Writes `state` to `folder` (a new temporary one unless given) and publishes that.

    The folder is served in place and stays: remove it when other nodes hold the version. With `lend` (default: as
    HOTWEIGHTS_USE_IPC_AGENT says) a copy of what lies on GPUs stays there for this node's engines to take, until they
    have, or for `lease_s`, up to an hour. `state` must not change until this returns.
    """
    if not 0 < lease_s <= LEASE_S_MAX:
        raise ValueError(f"lease_s takes seconds, up to {LEASE_S_MAX:g}, not {lease_s:g}")
    config = config or load_config()
    home = folder or Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=f"hotweights-{version}-"))
    await asyncio.to_thread(write_module, state, home, files=files)
    loan: Loan | None = None
    if config.use_ipc_agent if lend is None else lend:
        agent = await connect_or_start(config)
        try:
            digest = await agent.identify_folder(home, progress)
        finally:
            await agent.close()
        # Before engines are told to update: then they find it.
        loan = await asyncio.to_thread(
            lend_module, state, home / WEIGHTS, digest, model=model, config=config, lease_s=lease_s
        )
    try:
        return await publish_folder_async(
            home,
            model=model,
            version=version,
            config=config,
            start_update=start_update,
            options=options,
            progress=progress,
            wait_copies=wait_copies,
            wait_s=wait_s,
        )
    except Refused:
        if loan is not None:  # of what is no version
            await asyncio.to_thread(loan.end)
        raise


def publish_module(
    state: Mapping[str, Any],
    *,
    model: str,
    version: str,
    folder: Path | None = None,
    files: Mapping[str, bytes] | None = None,
    config: Config | None = None,
    start_update: bool = False,
    options: update_pb2.UpdateOptions | None = None,
    progress: Progress | None = None,
    wait_copies: int = 0,
    wait_s: float = 600.0,
    lend: bool | None = None,
    lease_s: float = 600.0,
) -> model_pb2.Version:
    """As publish_module_async, where no loop runs."""
    return asyncio.run(
        publish_module_async(
            state,
            model=model,
            version=version,
            folder=folder,
            files=files,
            config=config,
            start_update=start_update,
            options=options,
            progress=progress,
            wait_copies=wait_copies,
            wait_s=wait_s,
            lend=lend,
            lease_s=lease_s,
        )
    )
