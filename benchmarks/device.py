"""Writes into GPU memory: the parameters of a Llama of 8 billion (16 GB of bf16), changed wholly, by 1 % and by 0.1 %.

The values are at random places, which is the dearest for a write. Beside each write the floor of the same run: a copy
of all parameters within the device, or from pinned memory of the host to it.

  full_rate         of the device copy: all of it, from device memory
  full_pinned_rate  of the copy from pinned host memory: all of it, from there
  one_percent_time  over the device copy of everything; thousandth_time likewise
  *_proven_*        the same with what the pause reads back counted in
  undo_time         of the full write, over the write

Where the device has not room for three times the parameters, as many layers are left out as it takes.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.device_sets import LAYERS, module, no_gpu, shapes, timed
from benchmarks.report import Report, progress

SHARES = {"full": 1.0, "one_percent": 0.01, "thousandth": 0.001}
PINNED_BYTES = 1 << 30
THREADS = 8
ROOM = 4.2  # parameters, to be, as they were, and a place for the floor to copy to
RATIOS = ("full_rate", "full_proven_rate", "full_pinned_rate", "one_percent_time", "thousandth_time", "undo_time")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="two layers, few runs")
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    runs = 3 if args.quick else args.runs
    report = Report("device", runs)
    if why := no_gpu():
        for key in RATIOS:
            report.skip(key, why)
    else:
        measure(report, runs, 2 if args.quick else LAYERS)
    report.emit(as_json=args.json)
    return 0


def measure(report: Report, runs: int, wanted: int) -> None:
    """Of one module after the other: 0.1 %, 1 %, all of it, and all of it from the host."""
    import torch

    layers = wanted
    while layers > 1 and ROOM * _bytes(layers) > torch.cuda.mem_get_info()[0]:
        layers -= 1
    live = module(layers)
    whole = sum(parameter.nbytes for parameter in live.parameters())
    report.median("parameters", [whole / 1e9], "GB")
    base = [parameter.detach().cpu() for parameter in live.parameters()]
    aside = [torch.empty_like(parameter) for parameter in live.parameters()]

    def copy_all() -> None:
        for there, parameter in zip(aside, live.parameters(), strict=True):
            there.copy_(parameter.detach())

    pinned = torch.empty(min(PINNED_BYTES, whole), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device="cuda")
    for name, share in SHARES.items():
        progress(f"{name}: preparing")
        update, changed = prepared(live, base, share, 1 << 60)
        write, prove, undo, floor = cycles(update, runs, copy_all)
        proven = [a + b for a, b in zip(write, prove, strict=True)]
        report.median(f"{name}_write", [1e3 * s for s in write], "ms")
        report.median(f"{name}_read_back", [1e3 * s for s in prove], "ms")
        report.median(f"{name}_values", [changed], "values")
        if name == "full":
            report.ratio("full_rate", floor, write)
            report.ratio("full_proven_rate", floor, proven)
            report.ratio("undo_time", undo, write)
            report.median("device_copy", [2 * whole / s / 1e9 for s in floor], "GB/s, read and written")
        else:
            report.ratio(f"{name}_time", write, floor)
            report.ratio(f"{name}_proven_time", proven, floor)
        del update
        torch.cuda.empty_cache()
    progress("full, from the host: preparing")
    update, _ = prepared(live, base, 1.0, 0)
    times = whole / pinned.nbytes
    write, prove, undo, floor = cycles(update, runs, lambda: target.copy_(pinned, non_blocking=True))
    floor = [s * times for s in floor]
    report.ratio("full_pinned_rate", floor, write)
    report.median("full_pinned_write", [1e3 * s for s in write], "ms")
    report.median("host_copy", [whole / s / 1e9 for s in floor], "GB/s")
    progress("1 %, from the host: preparing")
    update, _ = prepared(live, base, 0.01, 0)
    write, prove, _, _ = cycles(update, runs, lambda: None)
    report.median("one_percent_pinned_write", [1e3 * s for s in write], "ms")


def _bytes(layers: int) -> int:
    sizes = 0
    for _, shape in shapes(layers):
        count = 2
        for length in shape:
            count *= length
        sizes += count
    return sizes


def prepared(live: Any, base: Sequence[Any], share: float, budget: int) -> tuple[Any, int]:
    """An update that writes other bits to a share of all values; and how many that are."""
    import torch

    from hotweights.adapters.device_writes import device_write
    from hotweights.adapters.placed import Budget
    from hotweights.adapters.update import Update
    from hotweights.adapters.writes import difference

    def found(at: int) -> Any:
        now = base[at].clone()
        new = base[at].clone()
        bits = new.view(torch.int16).view(-1)
        if share == 1.0:
            bits ^= 1
        else:
            bits[torch.randint(0, len(bits), (max(1, int(len(bits) * share)),))] ^= 3
        differing = difference(now.untyped_storage(), new.untyped_storage(), 2)
        assert differing is not None
        return differing

    with ThreadPoolExecutor(THREADS) as pool:
        differences = list(pool.map(found, range(len(base))))
    of = Budget(budget)
    parameters = list(live.parameters())
    writes = [device_write(p.untyped_storage(), d, of) for p, d in zip(parameters, differences, strict=True)]
    return Update(live, writes, None), sum(write.new_bytes for write in writes) // 2


def cycles(update: Any, runs: int, floor: Callable[[], object]) -> tuple[list[float], ...]:
    """Seconds of the write, of reading it back, of the undo and of the floor, run by run."""
    taken: tuple[list[float], ...] = ([], [], [], [])
    for run in range(runs + 1):
        seconds = (
            timed(lambda: update.write(lambda count: None)),
            timed(update.prove_written),
            timed(update.undo),
            timed(floor),
        )
        update.prove_undone()
        if run:  # the first warms up
            for kept, one in zip(taken, seconds, strict=True):
                kept.append(one)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
