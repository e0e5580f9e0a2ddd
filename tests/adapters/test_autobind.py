"""Engines that register by themselves: a real vLLM process against a coordinator that only listens."""

import asyncio
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests import warm
from tests.agents import end_agent
from tests.certificates import Authority
from tests.models import make_checkpoint

from hotweights.adapters import vllm_auto
from hotweights.v1 import model_pb2
from hotweights.v1 import worker_service_pb2 as pb
from hotweights.v1 import worker_service_pb2_grpc as rpc
from hotweights.worker_client.config import BadSetting, load_config

START_DEADLINE_S = 240.0
STOP_DEADLINE_S = 60.0

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

BY_CODE = """
import asyncio, sys
from tests import warm
from hotweights.adapters.vllm_auto import install_autobind

async def main():
    install_autobind(endpoint=sys.argv[2], model="m")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    args = AsyncEngineArgs(model=sys.argv[1], enforce_eager=True, max_model_len=256, dtype="bfloat16")
    llm = AsyncLLM.from_engine_args(args)
    while llm.hotweights_agent.status().get("model") != "m":
        await asyncio.sleep(0.05)
    print("following", repr(llm.hotweights_agent.active_version), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    llm.shutdown()

if __name__ == "__main__":
    warm.begin_if_asked()
    asyncio.run(main())
"""


class Listener(rpc.WorkerServiceServicer):
    """Welcomes whoever comes and keeps its Hello."""

    def __init__(self) -> None:
        self.hellos: asyncio.Queue[pb.Hello] = asyncio.Queue()
        self.shown: set[str] = set()

    async def Session(self, requests: AsyncIterator[pb.SessionRequest], context: Any) -> Any:
        self.shown.add(str(dict(context.invocation_metadata()).get("authorization", "")))
        async for request in requests:
            if request.WhichOneof("message") == "hello":
                self.hellos.put_nowait(request.hello)
                welcome = pb.Welcome(session_id="s", cluster_id="c", epoch=1, model="m", heartbeat_s=1, lease_s=5)
                yield pb.SessionResponse(welcome=welcome)


@pytest.fixture
async def coordinator() -> AsyncIterator[tuple[Listener, str]]:
    listener, server = Listener(), grpc.aio.server()
    rpc.add_WorkerServiceServicer_to_server(listener, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield listener, f"tcp://127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[tuple[Listener, dict[str, str]]]:
    """The same over mutual TLS, and the settings that get in."""
    authority = Authority(tmp_path)
    files, token = authority.issue("engine"), tmp_path / "token"
    token.write_text("the-engines\n")
    own = authority.issue("coordinator")
    credentials = grpc.ssl_server_credentials(
        [(own.key.read_bytes(), own.cert.read_bytes())], own.ca.read_bytes(), require_client_auth=True
    )
    listener, server = Listener(), grpc.aio.server()
    rpc.add_WorkerServiceServicer_to_server(listener, server)
    endpoint = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    yield listener, {"HOTWEIGHTS_ENDPOINT": endpoint, "HOTWEIGHTS_TOKEN_FILE": str(token), **files.environment}
    await server.stop(0)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    # A stage of the test's own, so that an agent that is started ends with it.
    own = {
        "HOTWEIGHTS_STAGE_DIR": str(tmp_path / "stage"),
        "HOTWEIGHTS_AGENT_IDLE_S": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HOTWEIGHTS_NODE": "node-1",
    }
    return {**os.environ, **own, **more}


def check_hello(hello: pb.Hello, policy: int) -> None:
    replica = hello.replica
    assert replica.policy == policy
    assert replica.engine.startswith("vllm ")
    assert [(rank.index, rank.node_id) for rank in replica.ranks] == [(0, "node-1")]


@pytest.mark.vllm
@pytest.mark.capability("OpenAI server")
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
async def test_a_server_with_the_endpoint_set_registers_itself_over_mutual_tls_and_stops_when_told(
    secured: tuple[Listener, dict[str, str]], tmp_path: Path
) -> None:
    listener, settings = secured
    folder = make_checkpoint(tmp_path / "model", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"),
        *("--max-model-len", "256", "--dtype", "bfloat16", "--port", str(port), "--host", "127.0.0.1"),
        env=environment(tmp_path, HOTWEIGHTS_REPLICA="r1", **settings),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        hello = await asyncio.wait_for(listener.hellos.get(), START_DEADLINE_S)
        assert hello.replica.replica_id == "r1"
        check_hello(hello, model_pb2.MODEL_POLICY_UNSPECIFIED)
        assert listener.shown == {"Bearer the-engines"}
        await asyncio.sleep(3)  # the HTTP part comes up after the engine
        server.send_signal(signal.SIGTERM)
        await asyncio.wait_for(server.wait(), STOP_DEADLINE_S)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
        await asyncio.to_thread(end_agent, load_config(environment(tmp_path)))


@pytest.mark.vllm
@pytest.mark.capability("install_autobind")
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
async def test_install_autobind_asks_for_policy_auto_and_sets_the_handle(
    coordinator: tuple[Listener, str], tmp_path: Path
) -> None:
    listener, endpoint = coordinator
    folder = make_checkpoint(tmp_path / "model", 1)
    (tmp_path / "by_code.py").write_text(BY_CODE)
    quicker = {"TEST_WARM": "1", "PYTHONPATH": str(warm.ROOT)}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, str(tmp_path / "by_code.py"), str(folder), endpoint),
        env=environment(tmp_path, HOTWEIGHTS_USE_IPC_AGENT="1", VLLM_LOGGING_LEVEL="ERROR", **quicker),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        check_hello(await asyncio.wait_for(listener.hellos.get(), START_DEADLINE_S), model_pb2.MODEL_POLICY_AUTO)
        lines: list[bytes] = []
        while not lines or not lines[-1].startswith(b"following"):
            lines.append(await asyncio.wait_for(program.stdout.readline(), START_DEADLINE_S))
            assert lines[-1], lines
        program.stdin.write(b"\n")
        assert await asyncio.wait_for(program.wait(), STOP_DEADLINE_S) == 0
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
        await asyncio.to_thread(end_agent, load_config(environment(tmp_path)))


def test_without_a_coordinator_the_plugin_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTWEIGHTS_ENDPOINT", raising=False)
    monkeypatch.delenv("HOTWEIGHTS_COORD", raising=False)
    monkeypatch.setattr(vllm_auto, "_patch_async_llm", lambda: pytest.fail("patched"))
    vllm_auto.register()


def test_a_bad_setting_leaves_the_engine_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOTWEIGHTS_ENDPOINT", "nonsense")
    monkeypatch.setattr(vllm_auto, "_patch_async_llm", lambda: pytest.fail("patched"))
    vllm_auto.register()
    assert "leaves this engine alone" in caplog.text


def test_autobind_without_a_coordinator_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTWEIGHTS_ENDPOINT", raising=False)
    monkeypatch.delenv("HOTWEIGHTS_COORD", raising=False)
    with pytest.raises(BadSetting, match="endpoint="):
        vllm_auto.install_autobind()
