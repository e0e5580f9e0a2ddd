"""Small images for tests of the stage and the agent."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hotweights.worker_client.image.manifest import Image, build_manifest

BUCKET_BYTES = 64 << 10


def make_folder(folder: Path, *, seed: int = 1, tensors: int = 4, tensor_bytes: int = 100_000) -> Path:
    """A checkpoint of two weight files and a config.json."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for shard in range(2):
        names = [f"layer.{shard}.{number}" for number in range(tensors // 2)]
        save_file(
            {name: random.integers(0, 255, tensor_bytes, dtype=np.uint8) for name in names},
            folder / f"model-{shard}.safetensors",
        )
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def make_image(folder: Path, *, seed: int = 1, tensors: int = 4, tensor_bytes: int = 100_000) -> Image:
    return build_manifest(
        make_folder(folder, seed=seed, tensors=tensors, tensor_bytes=tensor_bytes), bucket_bytes=BUCKET_BYTES
    )


def make_image_with_draft(folder: Path) -> Image:
    make_folder(folder)
    make_folder(folder / "draft", seed=2)
    return build_manifest(folder, bucket_bytes=BUCKET_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    """By their names in an image."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def touch_bytes(path: Path, offset: int) -> None:
    """Flips a byte in place."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 0xFF]))
