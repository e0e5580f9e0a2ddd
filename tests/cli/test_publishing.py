"""From a folder to a version, through a real agent."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.agents import end_agent

from hotweights.worker_client.config import load_config

from .processes import COMMAND, DEADLINE_S, Node, Serving, start_coordinator, stop

Folders = dict[str, Path]


def test_a_folder_is_published_once_and_again_and_other_content_is_refused_with_both_digests(
    agent: Serving, checkpoints: Folders
) -> None:
    first = agent.json("publish", str(checkpoints["v1"]), "--model", "m", "--version", "v1", "--wait-copies", "1")
    again = agent.json("publish", str(checkpoints["v1"]), "--model", "m", "--version", "v1")
    assert first["manifest_digest"] == again["manifest_digest"]
    assert first["holder_node_ids"] == ["here"]
    other = agent.json("verify", str(checkpoints["v2"]))
    line = agent.refusal("publish", str(checkpoints["v2"]), "--model", "m", "--version", "v1")
    assert first["manifest_digest"] in line
    assert other["manifest_digest"] in line


def test_the_model_is_the_only_one_there_is_and_status_shows_the_version_whole(
    agent: Serving, checkpoints: Folders
) -> None:
    said = agent.text("publish", str(checkpoints["v2"]), "--version", "v2")
    assert said.startswith("m v2: published, 8.4 kB, 2 tensors in 2 buckets, digest ")
    status = agent.text("coord-status")
    (row,) = [line.split() for line in status.splitlines() if line.split()[:2] == ["m", "v2"]]
    digest = agent.json("versions")[0]["manifest_digest"]
    assert row[2:8] == ["available", "8.4", "kB", "2", "2", "here"]
    assert row[8] == digest[:16]
    assert any(line.split()[:3] == ["here", "yes", "2"] for line in status.splitlines())
    assert "m v2 published" in status


def test_on_a_narrow_terminal_names_and_states_stay_whole(agent: Serving) -> None:
    ours, theirs = os.openpty()
    done = subprocess.run(
        [*COMMAND, "coord-status"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        env=agent.node.environment(HOTWEIGHTS_ENDPOINT=agent.endpoint, COLUMNS="60", TERM="xterm", NO_COLOR="1"),
        timeout=DEADLINE_S,
        check=False,
    )
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        text = terminal.read(1 << 16).decode()
    assert done.returncode == 0
    rows = [line.split() for line in text.splitlines()]
    assert ["m", "v2", "available", "8.4", "kB", "here"] in rows


def test_a_folder_is_verified_alone_and_against_a_version(agent: Serving, checkpoints: Folders) -> None:
    assert "2 tensors" in agent.text("verify", str(checkpoints["v1"]))
    assert "is m v1, digest" in agent.text("verify", str(checkpoints["v1"]), "--version", "v1")
    done = agent.run("verify", str(checkpoints["v1"]), "--version", "v2")
    assert done.returncode == 1
    assert "model.safetensors: bytes 0 to" in done.stdout
    assert "(in a.weight, b)" in done.stdout


def test_a_truncated_file_is_named(agent: Serving, checkpoints: Folders, tmp_path: Path) -> None:
    shutil.copytree(checkpoints["v1"], tmp_path / "short")
    os.truncate(tmp_path / "short" / "model.safetensors", 4000)
    for command in (["verify"], ["publish", "--version", "short"]):
        assert "model.safetensors" in agent.refusal(*command, str(tmp_path / "short"))


def test_what_is_neither_a_folder_nor_a_cached_model_is_refused(agent: Serving) -> None:
    line = agent.refusal("publish", "nobody/nothing", "--version", "x")
    assert "neither a folder nor in the local Hugging Face cache" in line


def test_copies_that_do_not_come_are_an_error_but_the_version_stays(agent: Serving, checkpoints: Folders) -> None:
    arguments = ("--version", "v3", "--wait-copies", "2", "--wait-timeout", "0.5")
    done = agent.run("publish", str(checkpoints["v3"]), *arguments)
    assert done.returncode == 1
    assert "it is held by 1 of 2 nodes: here" in done.stderr
    assert [version["name"] for version in agent.json("versions")] == ["v3", "v2", "v1"]


def test_a_version_is_deleted_by_name_and_one_that_is_not_there_is_refused(agent: Serving) -> None:
    assert agent.text("versions", "delete", "m", "v3") == "m v3: deleted\n"
    assert "the newest: v2, v1" in agent.refusal("versions", "delete", "m", "v3")
    endpoint = ("--endpoint", agent.endpoint)  # before the action or after it, it is the same coordinator
    for arguments in (("versions", *endpoint, "delete", "m", "x"), ("versions", "delete", "m", "x", *endpoint)):
        assert "m has no version 'x'" in agent.node.run(*arguments).stderr


def test_a_model_that_is_not_there_lists_those_that_are(agent: Serving) -> None:
    for command in ("update", "versions"):
        assert "models with versions: m" in agent.refusal(command, "--model", "nope")


def test_an_update_with_nobody_attached_is_refused_with_the_reason(agent: Serving) -> None:
    for command in ("update", "plan"):
        assert "no replica of m is attached" in agent.refusal(command)


def test_the_first_publisher_starts_the_agent_and_hears_when_it_follows_another_coordinator(
    serving: Serving, checkpoints: Folders
) -> None:
    node = Node(serving.node.folder / "auto")
    node.folder.mkdir()
    other = start_coordinator(node, "--store", "memory:")
    try:
        published = other.json("publish", str(checkpoints["v1"]), "--model", "solo", "--version", "v1")
        assert published["name"] == "v1"
        to_another = ("--endpoint", serving.endpoint, "--model", "solo", "--version", "v1")
        done = node.run("publish", str(checkpoints["v1"]), *to_another)
        assert done.returncode == 1
        assert f"follows {other.endpoint}, not {serving.endpoint}" in done.stderr
    finally:
        end_agent(load_config(node.environment()))
        assert stop(other.process) == 0
