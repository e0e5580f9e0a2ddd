"""The coordinator as a process of its own: SIGTERM, kill -9, and a second one on the same store."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.coordinator.live import fails, soon

from hotweights.coordinator.access import tokens as tokens_module
from hotweights.coordinator.access.tokens import Tokens, new_token
from hotweights.coordinator.config import BadSetting, Config
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.server import serve
from hotweights.coordinator.store import StoreBroken
from hotweights.v1 import coordinator_service_pb2 as pb
from hotweights.v1 import coordinator_service_pb2_grpc as rpc
from hotweights.wire.channel import open_channel
from hotweights.wire.endpoint import Endpoint, parse_endpoint

SERVE = """
import asyncio, sys
from hotweights.coordinator.config import Config
from hotweights.coordinator.server import serve
from hotweights.wire.endpoint import parse_endpoint
config = Config(endpoint=parse_endpoint("127.0.0.1:0"), store=sys.argv[1], stop_grace_s=60.0)
asyncio.run(serve(config, lambda endpoint: print(endpoint, flush=True)))
"""


@contextmanager
def coordinator(store: str) -> Iterator[tuple["subprocess.Popen[str]", Endpoint]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)[1]
        yield process, parse_endpoint(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def stub(channel: grpc.aio.Channel) -> Any:
    return rpc.CoordinatorServiceStub(channel)


async def test_sigterm_ends_it_cleanly_and_at_once_with_a_watch_open(tmp_path: Path) -> None:
    with coordinator(f"sqlite:{tmp_path / 's.db'}") as (process, endpoint):
        async with open_channel(endpoint) as channel:
            watch = stub(channel).WatchEvents(pb.WatchEventsRequest())
            await soon(watch.initial_metadata())
            process.send_signal(signal.SIGTERM)
            assert "the coordinator stops" in str(await fails(watch.read()))
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


async def test_kill_9_keeps_what_was_answered(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 's.db'}"
    with coordinator(store) as (process, endpoint):
        async with open_channel(endpoint) as channel:
            request = pb.SetModelPolicyRequest(model="m", policy=2)  # type: ignore[arg-type]
            await soon(stub(channel).SetModelPolicy(request))
            os.kill(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait, 10)
    with coordinator(store) as (_, endpoint):
        async with open_channel(endpoint) as channel:
            status = await soon(stub(channel).GetStatus(pb.GetStatusRequest()))
            assert [(model.name, model.policy) for model in status.models] == [("m", 2)]
            assert status.epoch == 2


async def test_a_second_one_on_the_same_store_is_kept_out(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 's.db'}"
    with coordinator(store):
        second = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", SERVE, store], capture_output=True, text=True, timeout=30
        )
    assert second.returncode != 0
    assert "in use by another coordinator" in second.stderr


async def test_a_leader_that_a_bug_ended_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def works(self: Runtime, items: list[object]) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Runtime, "_work", works)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(serve(Config(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:")), 20)
    assert time.monotonic() - began < 10


async def test_a_tokens_file_that_is_no_longer_followed_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def looks(self: Tokens) -> bool:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "tokens"
    path.write_text(f"operator alice {new_token()}\n")
    path.chmod(0o600)
    monkeypatch.setattr(tokens_module, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(Tokens, "look", looks)
    config = Config(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:", tokens=str(path))
    with pytest.raises(RuntimeError, match="start new thread"):
        await asyncio.wait_for(serve(config), 20)


async def test_a_store_that_breaks_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def works(self: Runtime, items: list[object]) -> None:
        raise StoreBroken("the disk is gone")

    monkeypatch.setattr(Runtime, "_work", works)
    with pytest.raises(StoreBroken, match="the disk is gone"):
        await asyncio.wait_for(serve(Config(endpoint=parse_endpoint("127.0.0.1:0"), store="memory:")), 20)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"endpoint": parse_endpoint("0.0.0.0:5555")}, "--insecure"),
        ({"endpoint": parse_endpoint("example.org:5555")}, "--insecure"),
        ({"keep_versions": -1}, "--keep-versions"),
        ({"keep_events": 0}, "--keep-events"),
        ({"heartbeat_s": 10.0, "lease_s": 15.0}, "two heartbeats"),
        ({"heartbeat_s": 0.0}, "two heartbeats"),
    ],
)
def test_settings_that_are_not_safe_or_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    config = Config(**{"endpoint": parse_endpoint("127.0.0.1:0"), "store": "memory:", **settings})
    with pytest.raises(BadSetting, match=text):
        config.check()


def test_an_endpoint_of_other_machines_is_allowed_when_asked_for() -> None:
    Config(endpoint=parse_endpoint("0.0.0.0:5555"), store="memory:", insecure=True).check()
    Config(endpoint=parse_endpoint("unix:/tmp/x"), store="memory:").check()
