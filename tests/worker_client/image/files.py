"""Small real checkpoints, and safetensors files that are wrong on purpose."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header at all: a dict, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def make_folder(folder: Path, seed: int = 0) -> Path:
    """One safetensors file, with tensors of many sizes (an empty one too), and what rides along."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    save_file(
        {
            "embed.weight": numbers.standard_normal((300, 40)).astype(np.float32),
            "empty": np.zeros((3, 0), np.float16),
            "layer.0.bias": numbers.integers(0, 255, 3).astype(np.uint8),
            "layer.0.weight": numbers.standard_normal((40, 40)).astype(np.float16),
            "scalar": np.full((), seed, np.float32),
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text('{"hidden_size": 40}')
    (folder / "merges.txt").write_text("a b\n")
    (folder / "added_tokens.json").write_text("")
    return folder


def make_folder_with_draft(folder: Path) -> Path:
    """A target and its draft model, which has tensors of the same names."""
    make_folder(folder)
    make_folder(folder / "draft", seed=1)
    return folder


def make_sharded_folder(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number, names in ((1, ("a", "b")), (2, ("c",))):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: np.full((5, 7), ord(name), np.float32) for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_hf_cache(cache: Path, model: str = "org/small", commit: str = "c0ffee") -> Path:
    """A model as the Hugging Face cache keeps it: a snapshot of links into blobs. The snapshot's folder."""
    kept = cache / ("models--" + model.replace("/", "--"))
    made = make_folder(kept / "made")
    (kept / "blobs").mkdir()
    snapshot = kept / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(made.iterdir())):
        blob = path.rename(kept / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / blob.name)
    made.rmdir()
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    return snapshot
