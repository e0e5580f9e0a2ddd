"""`coord-serve` and `coord-health`."""

import signal
import sqlite3
import subprocess
import sys

import pytest

from hotweights.cli.main import main

from .processes import DEADLINE_S, Node, Serving, one_line, start_coordinator, stop


def refused(node: Node, *arguments: str, code: int) -> str:
    done = node.run("coord-serve", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    # Before the error there may be log lines.
    return one_line(done.stderr.splitlines()[-1])


def test_it_prints_one_line_that_says_where_it_is_and_what_it_keeps(serving: Serving) -> None:
    store = f"sqlite:{serving.node.folder / 'coordinator.db'}"
    assert serving.first_line == f"coordinator at {serving.endpoint}, store {store}\n"
    assert not serving.endpoint.endswith(":0")


def test_its_log_goes_to_stderr_and_names_the_event_loop(serving: Serving) -> None:
    assert "event loop: uvloop" in serving.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_0_when_told_to_and_frees_its_store(node: Node, number: signal.Signals) -> None:
    path = node.folder / f"ends-{number.name}.db"
    serving = start_coordinator(node, "--store", f"sqlite:{path}")
    assert stop(serving.process, number) == 0
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone() == ("1",)
    db.close()


def test_a_store_in_use_by_another_coordinator_is_refused_by_name(serving: Serving) -> None:
    path = serving.node.folder / "coordinator.db"
    line = refused(serving.node, "--endpoint", "tcp://127.0.0.1:0", "--store", f"sqlite:{path}", code=1)
    assert line == f"{path} is in use by another coordinator"


def test_a_store_that_is_no_database_is_refused(node: Node) -> None:
    path = node.folder / "text.db"
    path.write_text("this is no database " * 100)
    line = refused(node, "--endpoint", "tcp://127.0.0.1:0", "--store", f"sqlite:{path}", code=1)
    assert str(path) in line


def test_a_port_that_is_taken_is_named(serving: Serving) -> None:
    line = refused(serving.node, "--endpoint", serving.endpoint, "--store", "memory:", code=1)
    assert line.startswith(f"cannot listen on {serving.endpoint}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--endpoint", "tcp://0.0.0.0:5555"], "--insecure"),
        (["--endpoint", "localhost"], "the port is missing"),
        (["--endpoint", ""], "write tcp://HOST:PORT"),
        (["--store", "postgres:x"], "write sqlite:PATH or memory:"),
        (["--lease", "1"], "--lease is at least two heartbeats"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["coord-serve", *arguments]) == 2
    assert said in one_line(capsys.readouterr().err)


def test_without_the_coordinator_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['platformdirs'] = None; from hotweights.cli.main import main; "
        "sys.exit(main(['coord-serve']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert "pip install 'hotweights[coordinator]'" in one_line(done.stderr)


def test_health_is_0_where_it_serves_and_1_where_nobody_is(serving: Serving) -> None:
    assert serving.text("coord-health") == f"coordinator {serving.endpoint}: serving\n"
    assert serving.json("coord-health")["status"] == "SERVING"
    line = serving.refusal("coord-health", "--endpoint", "tcp://127.0.0.1:1", "--timeout", "1")
    assert line.startswith("coordinator tcp://127.0.0.1:1: unreachable")
