"""Every command in the documents is run: the blocks by a sitting here, or by a test that the table names."""

import importlib.util
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hotweights.cli.main import build_parser

from .blocks import DOCUMENTS, REPO, Block, all_blocks
from .sittings import Home, run_bash, run_sitting
from .table import ELSEWHERE, SITTINGS, Elsewhere, Sitting

BLOCKS = {block.name: block for block in all_blocks()}
ELSEWHERE_NAMES = {f"{entry.document}: {entry.commands[0]}" for entry in ELSEWHERE}
SITTING_NAMES = {f"{sitting.document}: {first}" for sitting in SITTINGS for first in sitting.blocks}
WHAT_TO_DO = (
    "no test runs this block. In tests/docs/table.py, add a Sitting whose blocks hold its first command, or, if a test "
    "elsewhere runs it, an Elsewhere that names the test. If it only shows something, open its fence with ```text"
)


def make_module_checkpoint(folder: Path, seed: int) -> None:
    """For nn.Linear(64, 32)."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    save_file({"weight": torch.randn(32, 64), "bias": torch.randn(32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path, make_module_checkpoint)
    yield home
    home.close()


def test_every_block_is_run_by_a_test() -> None:
    told = [
        f"{block.document}, line {block.line}, `{block.commands[0]}`: {WHAT_TO_DO}"
        for block in all_blocks()
        if block.name not in SITTING_NAMES | ELSEWHERE_NAMES
    ]
    assert not told, "\n".join(told)


def test_the_table_names_only_blocks_that_there_are_and_each_once() -> None:
    assert BLOCKS.keys() >= SITTING_NAMES | ELSEWHERE_NAMES, "in tests/docs/table.py, but in no document any more"
    assert set() == SITTING_NAMES & ELSEWHERE_NAMES
    assert len(BLOCKS) == len(all_blocks()), "two blocks of a document begin alike: the table could not tell them apart"


@pytest.mark.parametrize("entry", ELSEWHERE, ids=lambda entry: f"{entry.document}: {entry.commands[0]}")
def test_a_block_that_is_run_elsewhere_is_what_that_test_runs(entry: Elsewhere) -> None:
    block = BLOCKS[f"{entry.document}: {entry.commands[0]}"]
    assert block.commands == entry.commands, (
        f"{block.document}, line {block.line}: the block has changed. See that {entry.test} still runs what it says, "
        "then write its commands into tests/docs/table.py"
    )
    file, _, name = entry.test.partition("::")
    assert f"def {name}(" in (REPO / file).read_text(), f"{entry.test} is gone: what runs the block now?"


@pytest.mark.parametrize("sitting", SITTINGS, ids=lambda sitting: sitting.name)
def test_a_reader_who_enters_the_blocks_gets_no_error(sitting: Sitting, home: Home) -> None:
    if sitting.needs and importlib.util.find_spec(sitting.needs) is None:
        pytest.skip(f"needs {sitting.needs}")
    run_sitting(sitting, blocks_of(sitting), home)


def blocks_of(sitting: Sitting) -> list[Block]:
    return [BLOCKS[f"{sitting.document}: {first}"] for first in sitting.blocks]


def test_a_command_that_fails_in_the_middle_of_a_block_is_told(home: Home) -> None:
    wrong = Block("README.md", 1, "", "hotweights config\nhotweights update --no-such-option v2\nhotweights config\n")
    with pytest.raises(AssertionError, match="no-such-option"):
        run_sitting(Sitting("README.md", ("hotweights config",)), [wrong], home)


def test_what_a_sitting_started_goes_when_its_time_is_over(tmp_path: Path) -> None:
    script = tmp_path / "sitting.bash"
    script.write_text(f"sleep 600 & echo $! >{tmp_path}/pid; wait\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_bash(script, os.environ, deadline_s=2.0)
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    ends = time.monotonic() + 10
    while _runs(stat) and time.monotonic() < ends:  # whoever took it over has yet to ask for its exit code
        time.sleep(0.05)
    assert not _runs(stat)


def _runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_make_has_every_target_that_is_named() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
    targets = {target for part in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", part)}
    assert {"demo", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_command_that_the_text_names_is_one_that_there_is() -> None:
    text = "\n".join(re.sub(r"^ *```.*?^ *```", "", d.read_text(), flags=re.DOTALL | re.MULTILINE) for d in DOCUMENTS)
    named = re.findall(r"`hotweights ([a-z][a-z-]*)", text)
    assert "config" in named
    commands = build_parser().format_help()
    assert [name for name in named if not re.search(rf"^    {name}\b", commands, re.MULTILINE)] == []
    programs = re.findall(r"`python (\S+\.py)", text) + [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"`python -m (benchmarks\.\w+)", text)
    ]
    assert "examples/vllm_smoke_demo.py" in programs
    assert [program for program in programs if not (REPO / program).exists()] == []
