"""Swaps in a row under traffic: nothing may grow with their number."""

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet import MODEL, WAIT_S, Fleet
from growth import Series, descendants, folder_mib, name_of, process_holds
from live_traffic import Traffic
from tests.faults_recorder import FaultRow

from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.v1 import update_pb2

pytestmark = [pytest.mark.vllm]

# Growth from the first samples to the last that is no leak. The store has a write-ahead log of 4 MiB that is filled
# once, and keeps 200 updates and their events. The rank's allocator spreads: a packed model is made and freed each
# time, and what traffic needs in between lands where it was. That flattens (108 MiB in the first hundred swaps, 43 in
# the second; without traffic 400 more swaps added nothing), so the dozen of CI is held to the same figure.
BOUNDS = {
    "memory_mib": 16.0,
    "rank memory_mib": 192.0,
    "descriptors": 4,
    "threads": 4,
    "mapped_files": 1,
    "stage_mib": 1.0,
    "store_mib": 6.0,
}


def processes(fleet: Fleet) -> dict[str, int]:
    """By what they are; the rank is a process below the engine core, or the core itself."""
    found = {"coordinator": fleet.pid("coordinator"), "agent": fleet.pid("agent"), "front end": fleet.pid("engine")}
    names = {name_of(pid): pid for pid in descendants(fleet.pid("engine"))}
    for what, title in (("engine core", "VLLM::EngineCore"), ("rank", "VLLM::Worker")):
        found.update((what, pid) for name, pid in names.items() if name.startswith(title))
    assert "engine core" in found, names
    return found


def holds(fleet: Fleet) -> dict[str, float]:
    """Of all processes of the fleet, and of what they keep on disk and in memory files."""
    sample = {f"{who} {what}": n for who, pid in processes(fleet).items() for what, n in process_holds(pid).items()}
    return {**sample, "stage_mib": folder_mib(fleet.stage), "store_mib": fleet.store_mib()}


def swap(coordinator: Any, version: str) -> None:
    """As `hotweights update` does it, without a process of its own each time."""
    request = pb.StartUpdateRequest(model=MODEL, version=version)
    update = coordinator.StartUpdate(request, timeout=WAIT_S).update
    ends = time.monotonic() + WAIT_S
    while not update.HasField("ended_at"):
        assert time.monotonic() < ends, update
        time.sleep(0.05)
        update = coordinator.GetUpdate(pb.GetUpdateRequest(id=update.id), timeout=WAIT_S).update
    assert update.phase == update_pb2.UPDATE_PHASE_COMMITTED, update


def swap_under_traffic(fleet: Fleet, oracles: dict[str, Any], swaps: int, every: int, warm_up: int) -> Series:
    """Alternates the versions, asks after each, and samples as it goes; pools and arenas fill in the warm-up."""
    series, traffic = Series(), Traffic(f"{fleet.url}/v1", MODEL, clients=2)
    traffic.start()
    with grpc.insecure_channel(fleet.endpoint.removeprefix("tcp://")) as channel:
        coordinator: Any = rpc.CoordinatorServiceStub(channel)
        try:
            for number in range(1 - warm_up, swaps + 1):
                version = ("v1", "v2")[number % 2 != warm_up % 2]
                swap(coordinator, version)
                assert fleet.outputs() == oracles[version]["outputs"], number
                if number >= 0 and number % every == 0:
                    series.add(number, holds(fleet))
        finally:
            traffic.stop()
    assert traffic.seen.failures == []
    return series


@pytest.mark.timeout(400)
def test_a_dozen_swaps_in_a_row_under_traffic_leave_nothing_behind(fleet: Fleet, oracles: dict[str, Any]) -> None:
    series = swap_under_traffic(fleet, oracles, swaps=10, every=2, warm_up=2)
    assert series.beyond(BOUNDS) == {}, series.as_dict()


@pytest.mark.matrix
@pytest.mark.timeout(3000)
def test_two_hundred_swaps_in_a_row_under_traffic_leave_nothing_behind(
    fleet: Fleet, oracles: dict[str, Any], fault_row: FaultRow
) -> None:
    fault_row.about("many-swaps")
    series = swap_under_traffic(fleet, oracles, swaps=200, every=10, warm_up=10)
    record(series)
    assert series.beyond(BOUNDS) == {}, series.as_dict()
    fault_row.ended("within the bounds of tests/end_to_end/test_many_swaps.py; no request failed")


def record(series: Series) -> None:
    """The series as JSON, into the folder HOTWEIGHTS_TEST_RESULTS; one that was looked at is in benchmarks/results."""
    if folder := os.environ.get("HOTWEIGHTS_TEST_RESULTS"):
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        body = {"test": "two hundred swaps", "date": date, **series.as_dict()}
        Path(folder, "two-hundred-swaps.json").write_text(json.dumps(body, indent=1) + "\n")
