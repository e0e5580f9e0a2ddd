"""How fast a folder becomes a manifest, beside BLAKE3 alone over the same bytes on all cores.

`hash_rate` is build_manifest, all of it (headers, reading, hashing, the protobuf), over the fastest of
three ways to run plain BLAKE3: its own threads over bytes that are in memory already, its own threads
over the mapped files, and one hasher a core over 16 MiB slices of memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from benchmarks.report import Report, progress
from hotweights.worker_client.image import build_manifest
from hotweights.worker_client.image.digests import usable_cores

MIB = 1 << 20
SLICE_BYTES = 16 * MIB
SHARDS = 2
# One layer of a small Llama, bf16: matrices of megabytes, norms of kilobytes.
LAYER = {
    "input_layernorm.weight": [2048],
    "self_attn.q_proj.weight": [2048, 2048],
    "self_attn.k_proj.weight": [512, 2048],
    "self_attn.v_proj.weight": [512, 2048],
    "self_attn.o_proj.weight": [2048, 2048],
    "post_attention_layernorm.weight": [2048],
    "mlp.gate_proj.weight": [8192, 2048],
    "mlp.up_proj.weight": [8192, 2048],
    "mlp.down_proj.weight": [2048, 8192],
}


def write_shard(path: Path, shard: int, size_bytes: int) -> None:
    """About `size_bytes` of layers, in safetensors' own layout; the bytes are random."""
    header: dict[str, object] = {}
    at = layer = 0
    while at < size_bytes:
        for name, shape in LAYER.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"model.layers.{shard}.{layer}.{name}"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
        layer += 1
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    noise = os.urandom(SLICE_BYTES)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for begin in range(0, at, SLICE_BYTES):
            file.write(noise[: at - begin])


def plain_ways(paths: list[Path]) -> dict[str, Callable[[], object]]:
    """Plain BLAKE3 over the files on all cores, in each reasonable way. Holds their bytes in memory."""
    contents = [path.read_bytes() for path in paths]
    slices = [memoryview(data)[at : at + SLICE_BYTES] for data in contents for at in range(0, len(data), SLICE_BYTES)]
    pool = ThreadPoolExecutor(usable_cores())
    return {
        "blake3_memory_rate": lambda: [blake3(data, max_threads=blake3.AUTO).digest() for data in contents],
        "blake3_mapped_rate": lambda: [blake3(max_threads=blake3.AUTO).update_mmap(path).digest() for path in paths],
        "blake3_slices_rate": lambda: list(pool.map(lambda part: blake3(part).digest(), slices)),
    }


def measure(folder: Path, runs: int) -> Report:
    """Every way once a run, in turn, after one run that warms the page cache."""
    paths = sorted(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in paths)
    ways: dict[str, Callable[[], object]] = {"manifest_rate": lambda: build_manifest(folder), **plain_ways(paths)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(-1, runs):
        # The order turns, so that no way always comes after the same other one.
        names = list(ways)
        for name in names[run % len(names) :] + names[: run % len(names)]:
            begin = time.perf_counter()
            ways[name]()
            if run >= 0:
                rates[name].append(total / (time.perf_counter() - begin) / 1e9)
        if run >= 0:
            progress(f"run {run + 1}/{runs}: " + ", ".join(f"{name} {rates[name][-1]:.2f}" for name in ways) + " GB/s")
    plain = max((name for name in ways if name != "manifest_rate"), key=lambda name: statistics.median(rates[name]))
    report = Report("manifest", runs)
    report.ratio("hash_rate", rates["manifest_rate"], rates[plain])
    for name in ways:
        report.median(name, rates[name], "GB/s")
    report.median("image_bytes", [total], "bytes")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help="a smaller image and fewer runs")
    parser.add_argument("--dir", type=Path, help="where the files go; the page cache of its file system is measured")
    arguments = parser.parse_args()
    size_bytes, runs = (512 * MIB, 9) if arguments.quick else (2048 * MIB, 25)
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="hotweights-manifest-") as name:
        progress(f"writing {size_bytes / 1e9:.2f} GB to {name}")
        for shard in range(SHARDS):
            write_shard(Path(name) / f"model-{shard}.safetensors", shard, size_bytes // SHARDS)
        report = measure(Path(name), runs)
    report.emit(as_json=arguments.json)


if __name__ == "__main__":
    main()
