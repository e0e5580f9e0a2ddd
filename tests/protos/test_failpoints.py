"""Failpoints act where and when they are told to, and nowhere else."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotweights.wire import failpoints
from hotweights.wire.failpoints import POINTS, BadFailpoint, Injected, parse_failpoints

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def passes(text: str, times: int) -> list[int]:
    """Which of so many passes raised."""
    failpoints.arm(text)
    raised = []
    for number in range(1, times + 1):
        try:
            failpoints.hit("stage.begin")
        except Injected:
            raised.append(number)
    return raised


def test_nothing_happens_unless_armed() -> None:
    assert passes("", 3) == []
    assert passes("stage.report:raise", 3) == []


def test_a_point_acts_at_every_pass_or_at_the_one_named() -> None:
    assert passes("stage.begin:raise", 3) == [1, 2, 3]
    assert passes("stage.begin=2:raise", 3) == [2]


def test_a_number_of_the_places_own_is_compared_instead_of_passes() -> None:
    points = parse_failpoints("apply.tensor=7:raise")
    points.hit("apply.tensor", 1)
    with pytest.raises(Injected, match=r"failpoint apply\.tensor=7"):
        points.hit("apply.tensor", 7)


def test_a_file_is_followed_and_written_again_counts_anew(tmp_path: Path) -> None:
    file = tmp_path / "points"
    points = parse_failpoints(f"@{file}")
    points.hit("stage.begin")  # no file yet
    for serial in (1, 2):
        file.write_text("stage.begin=2:raise")
        os.utime(file, ns=(serial, serial))
        points.hit("stage.begin")
        with pytest.raises(Injected):
            points.hit("stage.begin")
        points.hit("stage.begin")
    file.unlink()
    points.hit("stage.begin")


def test_hanging_blocks_the_thread_for_as_long_as_told() -> None:
    failpoints.arm("stage.begin:hang=0.2")
    begun = time.monotonic()
    failpoints.hit("stage.begin")
    assert time.monotonic() - begun >= 0.2


def test_kill_and_stop_are_real_signals() -> None:
    code = "import sys; from hotweights.wire import failpoints as f; f.arm(sys.argv[1]); f.hit('stage.begin'); print(1)"
    killed = subprocess.run([sys.executable, "-c", code, "stage.begin:kill"], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    with subprocess.Popen([sys.executable, "-c", code, "stage.begin:stop"], stdout=subprocess.PIPE) as stopped:
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        stopped.send_signal(signal.SIGCONT)
        assert stopped.communicate(timeout=30)[0] == b"1\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nowhere:raise", "nowhere"),
        ("stage.begin", "''"),
        ("stage.begin:explode", "explode"),
        ("stage.begin:hang=soon", "hang=soon"),
        ("stage.begin=x:raise", "stage.begin=x"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(BadFailpoint, match=re.escape(named)):
        parse_failpoints(text)


def test_the_table_and_the_code_name_the_same_points() -> None:
    """A point that is listed and nowhere passed would be a test that cannot fail."""
    roots = ("coordinator", "worker_client")
    files = [path for root in roots for path in (REPO / root).rglob("*.py")]
    passed = {name for path in files for name in re.findall(r"\bhit\(\s*\"([a-z.]+)\"", path.read_text())}
    assert passed == {point.name for point in POINTS}
