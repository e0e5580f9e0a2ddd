"""Commands that only look, and what all commands have in common."""

import json
import subprocess
import sys

import pytest

from hotweights.cli.main import main

from .processes import COMMAND, DEADLINE_S, Node, Serving, one_line

COMMANDS = (
    *("coord-serve", "serve", "coord-health", "agent", "publish", "verify", "update", "rollback", "plan", "cancel"),
    *("resume", "coord-status", "status", "versions", "events", "policy", "undrain", "config", "token"),
)


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from hotweights.cli.main import build_parser; build_parser().format_help(); "
        "print({name.partition('.')[0] for name in sys.modules} & {'grpc', 'google', 'torch', 'numpy', 'rich'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: hotweights ")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["coord-status", "--timeout", "soon"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_an_empty_coordinator_says_so(serving: Serving) -> None:
    status = serving.json("coord-status")
    assert status["models"] == []
    assert status["epoch"] == 1
    assert "models\n  none\n" in serving.text("status")


def test_a_model_without_a_name_must_be_named_while_there_is_none(serving: Serving) -> None:
    assert "has no model yet" in serving.refusal("update")


def test_a_policy_is_set_before_anything_is_published(serving: Serving) -> None:
    assert serving.text("policy", "m", "auto") == "m: policy auto\n"
    (model,) = serving.json("coord-status")["models"]
    assert (model["name"], model["policy"]) == ("m", "MODEL_POLICY_AUTO")
    assert serving.json("resume")["held"] is False


def test_the_status_of_a_model_that_is_not_there_lists_those_that_are(serving: Serving) -> None:
    assert "no version of model 'nope' is published; models with versions" in serving.refusal(
        "coord-status", "--model", "nope"
    )


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [("localhost", "the port is missing"), ("http://x:1", "unknown scheme 'http'"), ("", "the port is missing")],
)
def test_an_endpoint_that_is_none_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], endpoint: str, said: str
) -> None:
    assert main(["coord-status", "--endpoint", endpoint]) == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_coordinator_that_is_not_there_is_named_at_once(node: Node) -> None:
    # At once, or the run's own deadline ends it: the command would wait for an hour.
    done = node.run("coord-status", "--endpoint", "grpc://127.0.0.1:1", "--timeout", "3600")
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("coordinator tcp://127.0.0.1:1: Connection refused")


def test_the_endpoint_of_the_original_variable_is_read_too(serving: Serving) -> None:
    done = serving.node.run("coord-health", HOTWEIGHTS_COORD=serving.endpoint.removeprefix("tcp://"))
    assert done.returncode == 0, done.stderr


def test_a_setting_of_the_environment_that_cannot_be_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_BUCKET_BYTES", "many")
    assert main(["coord-status"]) == 2
    assert one_line(capsys.readouterr().err).startswith("HOTWEIGHTS_BUCKET_BYTES='many'")


def test_a_closed_pipe_is_quiet(serving: Serving) -> None:
    process = subprocess.Popen(
        [*COMMAND, "coord-status", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=serving.node.environment(HOTWEIGHTS_ENDPOINT=serving.endpoint),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stderr as stderr:
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 141
        assert stderr.read() == ""


def test_config_says_every_setting_its_value_and_where_it_came_from(node: Node) -> None:
    done = node.run("config", "--json", HOTWEIGHTS_COORD="127.0.0.1:7", HOTWEIGHTS_MAX_IMAGES="3")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert (rows["HOTWEIGHTS_MAX_IMAGES"]["value"], rows["HOTWEIGHTS_MAX_IMAGES"]["source"]) == ("3", "environment")
    assert rows["HOTWEIGHTS_ENDPOINT"]["source"] == "HOTWEIGHTS_COORD"
    assert rows["HOTWEIGHTS_AGENT_SOCKET"]["source"] == "HOTWEIGHTS_STAGE_DIR"
    assert rows["HOTWEIGHTS_REPLICA"]["value"] == "HOST-PID"
    assert rows["--endpoint"]["value"] == "tcp://127.0.0.1:7"
    assert str(node.folder / "state") in rows["--store"]["value"]
    assert "HOTWEIGHTS_MAX_IMAGES" in node.run("config").stdout
    assert rows["HOTWEIGHTS_SHARED"]["value"] == ""
    lists = {"HOTWEIGHTS_SHARED": "/mnt/a:/mnt/b", "HOTWEIGHTS_LEND_GPUS": "all"}
    rows = {row["name"]: row["value"] for row in json.loads(node.run("config", "--json", **lists).stdout)}
    assert {name: rows[name] for name in lists} == lists
