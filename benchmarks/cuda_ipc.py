"""GPU memory that another process lends: how fast it is copied from, beside the same tensors of this process.

A lender copies a module's tensors and lends the copy (hotweights.publish.lending); a reader borrows it (adapters.lent)
and copies every tensor to where it serves, as a rank does in its pause.

  copy_rate   of a plain copy of the same tensors within this process and device
  lend        seconds that the lender takes for its copy; borrow: seconds until the reader has the tensors
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.device_sets import module, no_gpu, timed
from benchmarks.report import Report, progress

LAYERS = 8
LENDER = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from hotweights.publish.lending import DeviceCopy
weights = Path(sys.argv[1])
state = load_file(weights, device="cuda")
torch.cuda.synchronize()
begun = time.perf_counter()
copy = DeviceCopy(state, weights)
print(time.perf_counter() - begun, copy.memories[0].SerializeToString().hex(), flush=True)
sys.stdin.read()
"""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="one layer, few runs")
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    runs = 3 if args.quick else args.runs
    report = Report("cuda_ipc", runs)
    if why := no_gpu():
        report.skip("copy_rate", why)
    else:
        with tempfile.TemporaryDirectory(prefix="hotweights-bench-", dir="/dev/shm") as folder:
            measure(report, runs, Path(folder), 1 if args.quick else LAYERS)
    report.emit(as_json=args.json)
    return 0


def measure(report: Report, runs: int, folder: Path, layers: int) -> None:
    """Through a file of the tensors, as a publisher writes it."""
    from safetensors.torch import save_file

    live = {name: parameter.detach() for name, parameter in module(layers).named_parameters()}
    weights = folder / "model.safetensors"
    progress("writing the image")
    save_file({name: tensor.cpu() for name, tensor in live.items()}, weights)
    lender = subprocess.Popen(
        [sys.executable, "-c", LENDER, str(weights)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert lender.stdout is not None
        seconds, told = lender.stdout.readline().split()
        borrowed(report, runs, live, folder, float(seconds), bytes.fromhex(told))
    finally:
        lender.kill()
        lender.communicate(timeout=60)


def borrowed(report: Report, runs: int, live: dict[str, Any], folder: Path, lend_s: float, told: bytes) -> None:
    """Interleaved, once a run."""
    import torch

    from hotweights.adapters.lent import LentImage
    from hotweights.adapters.mapped import MappedImage
    from hotweights.v1.agent_service_pb2 import DeviceMemory

    memory = DeviceMemory.FromString(told)
    ranges = [(part.file, part.file_offset, part.memory_offset, part.size_bytes) for part in memory.ranges]
    plain = {"device": memory.device_uuid, "handle": memory.handle, "seal": memory.seal, "ranges": ranges}
    image = MappedImage(folder, {})
    begun = time.perf_counter()
    lent = LentImage([plain], time.monotonic() + 3600.0, image, torch.device("cuda"))
    borrow_s = time.perf_counter() - begun
    assert set(lent.tensors) == set(live), lent.told(0)
    own = {name: tensor.clone() for name, tensor in live.items()}
    total = sum(tensor.nbytes for tensor in live.values())

    def copy(source: Any) -> None:
        for name, tensor in live.items():
            tensor.copy_(source[name], non_blocking=True)

    ours, floor = [], []
    for run in range(runs + 1):
        for tensor in live.values():
            tensor.zero_()
        theirs_s = timed(lambda: copy(lent.tensors))
        assert all(torch.equal(tensor.view(torch.int16), own[name].view(torch.int16)) for name, tensor in live.items())
        own_s = timed(lambda: copy(own))
        if run:
            ours.append(theirs_s)
            floor.append(own_s)
    lent.close()
    report.ratio("copy_rate", floor, ours)
    report.median("copied", [total / 1e9], "GB")
    report.median("copy", [1e3 * s for s in ours], "ms")
    report.median("plain_copy", [1e3 * s for s in floor], "ms")
    report.median("lend", [lend_s], "s")
    report.median("borrow", [borrow_s], "s")
    image.close()


if __name__ == "__main__":
    raise SystemExit(main())
