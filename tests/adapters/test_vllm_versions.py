"""A vLLM that was not tested is tried when it is newer, left alone when it is older, and said so once."""

import importlib.util
import logging
import multiprocessing

import pytest

from hotweights.adapters import vllm_auto, vllm_versions, vllm_worker
from hotweights.adapters.vllm_versions import NEWEST, OLDEST, judge, release, usable

OLDER = f"{OLDEST[0]}.{OLDEST[1] - 1}.3"
NEWER = f"{NEWEST[0]}.{NEWEST[1] + 1}.0rc1.dev7+gabc"


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    vllm_versions._warn.cache_clear()


@pytest.mark.parametrize(
    ("version", "found"),
    [("0.28.0", (0, 28)), ("0.32.1.post1+cpu", (0, 32)), ("v1.0", (1, 0)), ("dev", None), ("", None)],
)
def test_a_release_is_read_off_however_the_build_is_named(version: str, found: tuple[int, int] | None) -> None:
    assert release(version) == found


@pytest.mark.parametrize("version", ["0.28.0", "0.32.0", "0.32.9+cpu", "0.30.1.dev3"])
def test_nothing_is_said_of_a_tested_version(version: str) -> None:
    assert judge(version) == (True, "")


@pytest.mark.parametrize(
    ("version", "touched", "says"),
    [
        (NEWER, True, f"tries vLLM {NEWER}, which is newer than the tested 0.28 to 0.32"),
        ("1.0.0", True, "newer than the tested"),
        ("dev", True, "tries vLLM dev, which names no release"),
        (OLDER, False, f"leaves this engine alone: vLLM {OLDER} is older than the tested 0.28 to 0.32"),
    ],
)
def test_an_untested_version_is_named_beside_the_tested_ones(version: str, touched: bool, says: str) -> None:
    touch, text = judge(version)
    assert touch is touched
    assert says in text


def test_it_is_said_once_however_often_the_plugin_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    assert usable(NEWER)
    assert usable(NEWER)
    assert [(record.levelno, NEWER in record.message) for record in caplog.records] == [(logging.WARNING, True)]


def test_engine_cores_and_ranks_judge_alike_and_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    assert usable(NEWER)
    assert not usable(OLDER)
    assert caplog.records == []


def test_an_engine_that_is_too_old_gets_neither_methods_nor_a_controller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_ENDPOINT", "tcp://127.0.0.1:1")
    monkeypatch.setattr(vllm_auto, "_vllm_version", lambda: OLDER)
    monkeypatch.setattr(vllm_worker, "install", lambda: pytest.fail("methods were set"))
    monkeypatch.setattr(vllm_auto, "_patch_async_llm", lambda: pytest.fail("patched"))
    vllm_auto.register()
    assert "leaves this engine alone" in caplog.text


def test_a_vllm_that_has_moved_what_is_hooked_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def moved() -> None:
        raise ImportError("cannot import name 'WorkerBase'")

    monkeypatch.setenv("HOTWEIGHTS_ENDPOINT", "tcp://127.0.0.1:1")
    monkeypatch.setattr(vllm_auto, "_vllm_version", lambda: NEWER)
    monkeypatch.setattr(vllm_worker, "install", moved)
    monkeypatch.setattr(vllm_auto, "_patch_async_llm", lambda: pytest.fail("patched"))
    vllm_auto.register()
    assert f"leaves this engine alone: vLLM {NEWER} is built otherwise: cannot import name" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_vllm_of_this_environment_is_a_tested_one() -> None:
    assert judge(vllm_auto._vllm_version()) == (True, "")
