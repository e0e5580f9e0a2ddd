"""The measure of growth itself: a leak is seen, and noise is not."""

from pathlib import Path

from growth import Series, descendants, folder_mib, process_holds

BOUNDS = {"memory_mib": 10.0, "descriptors": 0}


def a_series(**values: list[float]) -> Series:
    series = Series()
    for at in range(len(next(iter(values.values())))):
        series.add(at, {name.replace("__", " "): held[at] for name, held in values.items()})
    return series


def test_what_grew_beyond_its_bound_is_named_with_by_how_much() -> None:
    leaking = [100.0 + 2 * at for at in range(20)]
    series = a_series(rank__memory_mib=leaking, agent__memory_mib=[50.0] * 20, agent__descriptors=[20.0] * 20)
    assert series.beyond(BOUNDS) == {"rank memory_mib": 34.0}


def test_a_name_may_have_a_bound_of_its_own() -> None:
    growing = [100.0 + at for at in range(20)]
    series = a_series(rank__memory_mib=growing, agent__memory_mib=growing)
    assert series.beyond({**BOUNDS, "rank memory_mib": 30.0}) == {"agent memory_mib": 17.0}


def test_one_sample_that_fell_into_an_allocation_is_no_growth() -> None:
    series = a_series(rank__memory_mib=[100.0] * 19 + [400.0], agent__descriptors=[20.0] * 18 + [29.0, 20.0])
    assert series.beyond(BOUNDS) == {}


def test_what_this_process_holds_is_counted(tmp_path: Path) -> None:
    import os
    import subprocess

    before = process_holds(os.getpid())
    child = subprocess.Popen(["sleep", "60"])
    with (tmp_path / "one").open("wb") as file:
        file.write(bytes(3 << 20))
        file.flush()
        assert process_holds(os.getpid())["descriptors"] == before["descriptors"] + 1
    assert folder_mib(tmp_path) == 3.0
    assert child.pid in descendants(os.getpid())
    child.kill()
    child.wait(10)
    assert before["memory_mib"] > 1
    assert before["threads"] >= 1
