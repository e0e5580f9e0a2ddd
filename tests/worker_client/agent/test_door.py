"""The agent's socket: who gets in, as the kernel says it, and what becomes of those who do not."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.worker_client.agent.nodes import SmallCoordinator, a_config, a_coordinator, agent_of, until
from tests.worker_client.stage.checkpoints import make_folder

from hotweights.transports import frames
from hotweights.v1 import fleet_pb2
from hotweights.wire.errors import Refused, Unreachable
from hotweights.worker_client.agent import data as data_module
from hotweights.worker_client.agent import door as door_module
from hotweights.worker_client.agent.door import Door, inner_folder
from hotweights.worker_client.agent.peers import AllowList, Peer, parse_allow, peer_of
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import BadSetting, Config, load_config

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
DEADLINE_S = 30.0
OTHER, OTHER_GROUP, THIRD_GROUP = 54321, 54322, 54323

# Imports as root, for the interpreter may lie where the other user cannot read; then it is that user.
PROGRAM = """
import asyncio, json, os, socket, sys
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.agent_client import AgentClient
from hotweights.worker_client.config import load_config
wish = json.loads(sys.argv[1])
config = load_config(wish["environ"])
os.setgroups(wish["groups"]); os.setgid(wish["gid"]); os.setuid(wish["uid"])
async def main():
    client = AgentClient(config)
    try:
        return {"pid": (await client.probe()).pid}
    except HotweightsError as error:
        return {"error": type(error).__name__, "reason": getattr(error, "reason", ""), "text": str(error)}
    finally:
        await client.close()
if wish["path"]:
    try:
        socket.socket(socket.AF_UNIX).connect(wish["path"])
        said = "connected"
    except OSError as error:
        said = type(error).__name__
    print(json.dumps({"raw": said}))
else:
    print(json.dumps({**asyncio.run(main()), "mine": os.getpid()}))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """Every user may go in; short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="hw-door-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
async def coordinator() -> AsyncIterator[SmallCoordinator]:
    async with a_coordinator() as small:
        yield small


def shared(home: Path, allow: str, endpoint: str = "") -> Config:
    """An agent whose socket others reach."""
    return a_config(home, "a", endpoint, HOTWEIGHTS_AGENT_SOCKET=str(home / "agent.sock"), HOTWEIGHTS_AGENT_ALLOW=allow)


async def as_other(
    config: Config, uid: int = OTHER, gid: int = OTHER_GROUP, groups: tuple[int, ...] = (), path: Path | None = None
) -> dict[str, Any]:
    """What becomes of another user who asks the agent for its status, or who connects to `path`."""
    environ = {"HOTWEIGHTS_AGENT_SOCKET": str(config.agent_socket), "HOTWEIGHTS_STAGE_DIR": str(config.stage_dir)}
    wish = {"environ": environ, "uid": uid, "gid": gid, "groups": groups, "path": str(path or "")}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", PROGRAM, json.dumps(wish)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def log_of(config: Config) -> str:
    return (config.stage_dir / "agent.log").read_text()


@as_root
async def test_a_user_who_is_not_on_the_list_is_refused_by_name_and_the_coordinator_hears_of_it(
    home: Path, coordinator: SmallCoordinator
) -> None:
    config = shared(home, "12345", coordinator.endpoint)
    async with agent_of(config) as agent:
        await coordinator.hears("a")
        answer = await as_other(config)
        assert (answer["error"], answer["reason"]) == ("Refused", "PEER_REFUSED")
        assert "HOTWEIGHTS_AGENT_ALLOW" in answer["text"]
        who = f"uid {OTHER}, pid {answer['mine']}"
        assert f"refused {who}, who is not in HOTWEIGHTS_AGENT_ALLOW" in log_of(config)

        def told() -> list[fleet_pb2.Refusal]:
            said = [report for report in coordinator.reports["a"] if report.WhichOneof("event") == "peer_refused"]
            return [report.peer_refused.refusal for report in said]

        await until(lambda: bool(told()), "the refusal is reported")
        assert told()[0] == fleet_pb2.Refusal(peer=who, method="connect", reason="PEER_REFUSED")
        assert (await agent.status()).node_id == "a"


@as_root
@pytest.mark.parametrize(
    ("allow", "gid", "groups"),
    [
        (f"{OTHER}", OTHER_GROUP, ()),
        (f" 7 , {OTHER},", OTHER_GROUP, ()),
        (f"@{OTHER_GROUP}", OTHER_GROUP, ()),
        (f"@{THIRD_GROUP}", OTHER_GROUP, (1, THIRD_GROUP)),
    ],
)
async def test_a_user_on_the_list_is_served(home: Path, allow: str, gid: int, groups: tuple[int, ...]) -> None:
    config = shared(home, allow)
    async with agent_of(config) as agent:
        answer = await as_other(config, gid=gid, groups=groups)
        assert answer.get("pid") == (await agent.status()).pid, answer


@as_root
async def test_by_default_the_socket_is_the_owners_and_the_kernel_keeps_others_out(home: Path) -> None:
    config = shared(home, "")
    async with agent_of(config):
        assert (config.agent_socket.stat().st_mode & 0o777) == 0o600
        assert await as_other(config, path=config.agent_socket) == {"raw": "PermissionError"}


@as_root
async def test_nobody_else_reaches_the_sockets_behind_the_door(home: Path) -> None:
    config = shared(home, "12345")
    async with agent_of(config):
        for inner in inner_folder(config.agent_socket).iterdir():
            assert inner.is_socket()
            assert await as_other(config, path=inner) == {"raw": "PermissionError"}
    assert sorted(os.listdir(home)) == ["a", "agent.sock.lock"]


async def test_who_is_refused_and_stays_is_cut_off_and_holds_up_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "REFUSED_MAX", 3)
    monkeypatch.setattr(door_module, "REFUSED_S", 0.5)
    monkeypatch.setattr(AllowList, "admits", lambda self, peer: False)
    # Without gRPC's own pings, which would end them some day: they speak the protocol and ask for nothing.
    monkeypatch.setattr(door_module, "server_options", list)
    inside: list[int] = []
    relay = door_module._relay

    async def counted(*ends: Any) -> None:
        inside.append(door._refused)
        await relay(*ends)

    monkeypatch.setattr(door_module, "_relay", counted)
    async with served_door(home, AllowList(), greet=False) as (door, refused):
        strangers = [await asyncio.open_unix_connection(home / "s") for _ in range(40)]
        for _, writer in strangers:
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        for reader, _ in strangers:
            with suppress(ConnectionError):
                while await asyncio.wait_for(reader.read(1000), DEADLINE_S):
                    pass
        assert 1 <= max(inside) <= 3
        assert door.connection_count == 0
        assert 1 <= len(refused) <= door_module.OF_ONE_USER.burst, "said a few times, not forty"
        assert refused[0][0].uid == os.geteuid()
        for _, writer in strangers:
            writer.close()


@asynccontextmanager
async def served_door(
    home: Path, allow: AllowList, *, greet: bool = True
) -> AsyncIterator[tuple[Door, list[tuple[Peer, int]]]]:
    """A door before a server that sends for ever, and says no more than that."""
    refused: list[tuple[Peer, int]] = []
    door = Door(home / "s", allow, lambda peer, passed_over: refused.append((peer, passed_over)))
    door.prepare()

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while greet:
                writer.write(b"x" * 65536)
                await writer.drain()
        except OSError:
            ended.set()
        finally:
            writer.close()

    ended = asyncio.Event()
    server = await asyncio.start_unix_server(flood, door.inner)
    await door.open()
    door.flooding_ended = ended  # type: ignore[attr-defined]
    try:
        yield door, refused
    finally:
        await door.close()
        server.close()


async def test_a_client_that_reads_nothing_is_cut_off_and_takes_no_memory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "STALL_S", 0.5)
    async with served_door(home, AllowList()) as (door, _):
        reader, writer = await asyncio.open_unix_connection(home / "s", limit=1024)
        await until(lambda: door.connection_count == 1, "it is in")
        await until(lambda: door.connection_count == 0, "it is cut off")
        await asyncio.wait_for(door.flooding_ended.wait(), DEADLINE_S)  # type: ignore[attr-defined]
        writer.close()
        assert reader is not None


async def test_connections_beyond_the_limit_are_closed_and_room_comes_back(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "CONNECTIONS_MAX", 2)
    config = a_config(home, "a")
    async with agent_of(config) as agent:  # the first
        _, second = await asyncio.open_unix_connection(config.agent_socket)
        await asyncio.sleep(0.1)
        reader, third = await asyncio.open_unix_connection(config.agent_socket)
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        third.close()
        second.close()
        await asyncio.sleep(0.1)
        another = AgentClient(config)
        assert (await another.status()).pid == (await agent.status()).pid
        await another.close()


class Visitors:
    """Connections to a door, of users as a test says them for the kernel."""

    def __init__(self, socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._monkeypatch = socket_path, monkeypatch
        self._writers: list[asyncio.StreamWriter] = []

    async def turned_away(self, uid: int) -> bool:
        """Whether one more is closed at once; else it stays."""
        self._monkeypatch.setattr(door_module, "peer_of", lambda _: Peer(1, uid, frozenset()))
        reader, writer = await asyncio.open_unix_connection(self._path, limit=1024)
        self._writers.append(writer)
        try:
            return await asyncio.wait_for(reader.read(1), DEADLINE_S) == b""
        except ConnectionError:
            return True

    async def leave(self, door: Door) -> None:
        for writer in self._writers:
            writer.close()
        await until(lambda: door.connection_count == 0, "all have gone")


async def test_a_user_on_the_list_locks_nobody_else_out_and_all_of_them_not_the_owner(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("CONNECTIONS_MAX", 6), ("OF_ONE_OTHER_MAX", 2), ("RESERVED", 3)):
        monkeypatch.setattr(door_module, name, value)
    visitors = Visitors(home / "s", monkeypatch)
    async with served_door(home, AllowList(frozenset({OTHER, OTHER + 1}))) as (door, _):
        assert [await visitors.turned_away(OTHER) for _ in range(20)] == [False] * 2 + [True] * 18
        assert [await visitors.turned_away(OTHER + 1) for _ in range(2)] == [False, True], "3 of 6 are the owner's"
        assert [await visitors.turned_away(os.geteuid()) for _ in range(4)] == [False] * 3 + [True]
        told = [record.getMessage() for record in caplog.records if "was closed" in record.getMessage()]
        assert f"a connection of uid {OTHER}, pid 1 was closed" in told[0]
        assert len(told) == door_module.OF_ONE_USER.burst + 2, "twenty are not said one by one"
        await visitors.leave(door)
        assert not await visitors.turned_away(OTHER)
        await visitors.leave(door)


GARBAGE = {
    "nothing": b"",
    "random": bytes(range(256)) * 40,
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a preface and nonsense": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4000,
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_on_the_socket_disturbs_nobody(home: Path, what: str) -> None:
    config = a_config(home, "a")
    async with agent_of(config) as agent:
        digest = await agent.identify_folder(make_folder(home / "v1"))
        for _ in range(5):
            _, writer = await asyncio.open_unix_connection(config.agent_socket)
            writer.write(GARBAGE[what])
            writer.close()
        await agent.stage(digest)
        assert (await agent.status()).node_id == "a"


async def test_what_lies_where_the_inner_sockets_go_must_be_a_folder_of_ours(home: Path) -> None:
    def door_at(name: str) -> Door:
        return Door(home / name, AllowList(), lambda *_: None)

    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    inner_folder(home / "link").symlink_to(elsewhere)
    with pytest.raises(Refused, match="is not a folder of user"):
        door_at("link").prepare()
    if os.geteuid() == 0:
        inner_folder(home / "theirs").mkdir()
        os.chown(inner_folder(home / "theirs"), OTHER, OTHER)
        with pytest.raises(Refused, match="is not a folder of user"):
            door_at("theirs").prepare()
    open_folder = inner_folder(home / "open")
    open_folder.mkdir()
    open_folder.chmod(0o777)
    (open_folder / "a").touch()
    door_at("open").prepare()
    assert open_folder.stat().st_mode & 0o777 == 0o700
    assert list(open_folder.iterdir()) == []


async def test_after_an_agent_was_killed_the_next_one_serves(home: Path) -> None:
    config = a_config(home, "a")
    folder = inner_folder(config.agent_socket)
    folder.mkdir(parents=True, mode=0o700)
    config.stage_dir.chmod(0o700)
    for stale in (config.agent_socket, folder / "a", folder / "r"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(stale))
    async with agent_of(config) as agent:
        assert (await agent.status()).node_id == "a"


async def test_an_agent_that_is_gone_is_gone_for_its_clients_too(home: Path) -> None:
    config = a_config(home, "a")
    client = AgentClient(config)
    async with agent_of(config):
        await client.status()
    with pytest.raises(Unreachable):
        await client.probe()
    await client.close()


async def test_a_door_that_closes_with_connections_open_has_nothing_to_complain_of(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served_door(home, AllowList()) as (door, _):
        reader, writer = await asyncio.open_unix_connection(home / "s", limit=1024)
        await until(lambda: door.connection_count == 1, "it is in")
    while await asyncio.wait_for(reader.read(65536), DEADLINE_S):
        pass
    assert [record.message for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    writer.close()


def test_the_kernel_says_who_connects() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        peer = peer_of(one)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert {os.getegid(), *os.getgroups()} == peer.groups
    assert str(peer) == f"uid {os.geteuid()}, pid {os.getpid()}"


def test_the_owner_and_root_are_always_admitted() -> None:
    for uid in (0, os.geteuid()):
        assert AllowList().admits(Peer(1, uid, frozenset()))
    assert not AllowList().admits(Peer(1, OTHER, frozenset({0})))
    assert not AllowList().has_others


def test_a_list_has_users_and_groups_by_name_or_number() -> None:
    import grp

    group = grp.getgrall()[-1]
    assert parse_allow("") == AllowList()
    assert parse_allow(f"1, 2 ,@{group.gr_name},@7") == AllowList(frozenset({1, 2}), frozenset({group.gr_gid, 7}))


BAD: dict[str, str] = {
    "nobody": "'nobody' is neither a user's number nor @GROUP",
    "1;2": "neither",
    "-1": "neither",
    "²": "neither",
    "@no-such-group": "there is no group 'no-such-group'",
    "@": "there is no group ''",
    "@\0": "there is no group",
}


@pytest.mark.parametrize("text", BAD)
def test_a_list_that_cannot_be_says_which_entry_and_what_it_takes(text: str) -> None:
    with pytest.raises(BadSetting, match=BAD[text]) as caught:
        load_config({"HOTWEIGHTS_AGENT_ALLOW": text})
    assert "takes UID,@GROUP" in str(caught.value)


def test_an_agent_that_a_client_starts_has_the_same_list() -> None:
    listed: Callable[[str], Config] = lambda text: load_config({"HOTWEIGHTS_AGENT_ALLOW": text})  # noqa: E731
    assert load_config(listed("1,@0").as_environ()).agent_allow == "1,@0"


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_on_the_data_port_disturbs_no_reader(
    home: Path, coordinator: SmallCoordinator, what: str
) -> None:
    folder = make_folder(home / "v1")
    async with (
        agent_of(a_config(home, "a", coordinator.endpoint)) as source,
        agent_of(a_config(home, "b", coordinator.endpoint)),
    ):
        digest = (await source.publish_folder(folder, "m", "v1")).manifest_digest
        await coordinator.hears("a", "b")
        host, _, port = coordinator.hellos["a"].data_endpoint.removeprefix("tcp://").rpartition(":")
        writers = []
        for _ in range(5):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(GARBAGE[what])
            writers.append(writer)
        report = await coordinator.outcome("b", coordinator.stage("b", digest, "a"))
        assert report.WhichOneof("event") == "staged", report
        for writer in writers:
            writer.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", frames.hello(b"x") + frames.read(bytes(32), 0, 0, 9)])
async def test_strangers_at_the_data_port_do_not_fill_the_log(
    home: Path, coordinator: SmallCoordinator, sent: bytes
) -> None:
    config = a_config(home, "a", coordinator.endpoint)
    async with agent_of(config):
        await coordinator.hears("a")
        host, _, port = coordinator.hellos["a"].data_endpoint.removeprefix("tcp://").rpartition(":")
        for _ in range(60):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            with suppress(ConnectionError):
                while await asyncio.wait_for(reader.read(1000), DEADLINE_S):
                    pass
            writer.close()
        lines = [line for line in log_of(config).splitlines() if "agent.data" in line]
        assert 1 <= len(lines) <= data_module.OF_ONE_HOST.burst
