"""Every setting of the worker side, read once from the environment.

`SETTINGS` is the table that `hotweights config` prints and docs/PRESETS.md shows.
"""

import os
import re
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hotweights.wire.endpoint import Endpoint, parse_endpoint
from hotweights.wire.failpoints import BadFailpoint, parse_failpoints

if TYPE_CHECKING:
    from hotweights.wire.access import Access


class BadSetting(ValueError):
    """A setting that cannot be used; the message names it and says what it takes."""

    def __init__(self, name: str, value: str, wanted: str) -> None:
        super().__init__(f"{name}={value!r}: {wanted}")
        self.name = name


@dataclass(frozen=True)
class Setting:
    """One line of the settings table."""

    name: str
    default: str
    meaning: str


SETTINGS = (
    Setting("HOTWEIGHTS_ENDPOINT", "", "the coordinator; HOTWEIGHTS_COORD is read when it is unset"),
    Setting("HOTWEIGHTS_CA", "", "whose certificates are trusted (PEM file), for grpcs:// and between agents"),
    Setting("HOTWEIGHTS_CERT", "", "this client's certificate (PEM file); an agent's data port shows it too"),
    Setting("HOTWEIGHTS_KEY", "", "the certificate's key (PEM file)"),
    Setting("HOTWEIGHTS_TOKEN_FILE", "", "file of the token that is shown to the coordinator"),
    Setting("HOTWEIGHTS_TOKEN", "", "the token itself, read when HOTWEIGHTS_TOKEN_FILE is unset; never printed"),
    Setting("HOTWEIGHTS_INSECURE_TOKEN", "0", "1 sends the token in plaintext to other machines too"),
    Setting("HOTWEIGHTS_MODEL", "", "the model an engine follows; empty is the coordinator's only one"),
    Setting("HOTWEIGHTS_REPLICA", "HOST-PID", "the replica's id; set it to keep it over restarts"),
    Setting("HOTWEIGHTS_NODE", "host name", "the node's id"),
    Setting("HOTWEIGHTS_ZONE", "", "the rack or zone of the node: images come into it once"),
    Setting("HOTWEIGHTS_STAGE_DIR", "/dev/shm/hotweights-UID", "where images are staged"),
    Setting("HOTWEIGHTS_AGENT_SOCKET", "STAGE_DIR/agent.sock", "the node's agent"),
    Setting("HOTWEIGHTS_AGENT_ALLOW", "", "who may use the agent beside its own user and root: UID,@GROUP,..."),
    Setting("HOTWEIGHTS_LISTEN", "127.0.0.1:0", "where the agent serves buckets to other nodes"),
    Setting("HOTWEIGHTS_ADVERTISE", "", "that address as other nodes see it"),
    Setting("HOTWEIGHTS_BUCKET_BYTES", "by the image", "size of a bucket; 64 KiB to 1 GiB"),
    Setting("HOTWEIGHTS_BANDWIDTH_MAX", "", "bytes a second that an agent sends, and that it fetches: 200MB"),
    Setting("HOTWEIGHTS_NICE", "0", "how far the agent gives way to what serves, 0 to 19: see nice(1)"),
    Setting("HOTWEIGHTS_TRANSPORT", "auto", "auto, tcp, ucx or mpi: how buckets go between nodes"),
    Setting("HOTWEIGHTS_SHARED", "", "folders that all nodes see at the same path, by colons: read in place"),
    Setting("HOTWEIGHTS_CONNECTIONS", "2", "buckets of an image on their way to a node at once; 1 to 8"),
    Setting("HOTWEIGHTS_UCX_TLS", "", "UCX_TLS of the agent: the transports that UCX may take"),
    Setting("HOTWEIGHTS_UCX_NET_DEVICES", "", "UCX_NET_DEVICES of the agent: mlx5_0:1"),
    Setting("HOTWEIGHTS_MAX_IMAGES", "2", "images kept on a node; more only while pinned"),
    Setting("HOTWEIGHTS_AGENT_IDLE_S", "300", "after which an agent that was not started by hand ends"),
    Setting("HOTWEIGHTS_POLICY", "", "auto or manual: what an engine asks for its model"),
    Setting("HOTWEIGHTS_NAME_MAP", "", "checkpoint=module pairs, comma-separated; renames tensors"),
    Setting(
        "HOTWEIGHTS_USE_IPC_AGENT", "0", "1: GPU memory is lent and borrowed within the node; sets `hotweights_agent`"
    ),
    Setting("HOTWEIGHTS_LEND_GPUS", "", "GPUs in whose memory the agent lends images: all, or UUIDs by commas"),
    Setting("HOTWEIGHTS_ADOPT_CLUSTER", "0", "1 follows a coordinator whose store was replaced"),
    Setting("HOTWEIGHTS_ROUTE", "auto", "auto, direct, assembled or reload: how weights get into an engine"),
    Setting("HOTWEIGHTS_DEVICE_BUDGET", "a quarter of what is free", "bytes of GPU memory for prepared writes, a rank"),
    Setting("HOTWEIGHTS_TORN", "end", "end or stay: what becomes of a server whose engine is in doubt"),
    Setting("HOTWEIGHTS_FAILPOINTS", "", "for tests: failures to inject; `hotweights failpoints` lists them"),
)

_TRUE = {"1", "true", "yes", "on"}
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
BANDWIDTH_MIN = 1e6  # a bucket of 16 MiB takes 17 s then; sources below a fifth of that are left


@dataclass(frozen=True)
class Config:
    """The worker side's settings, checked."""

    endpoint: Endpoint | None
    model: str
    node: str
    zone: str
    replica: str
    stage_dir: Path
    agent_socket: Path
    listen: str
    advertise: str
    bucket_bytes: int | None
    bandwidth_max: float | None
    nice: int
    transport: str
    connections: int
    max_images: int
    agent_idle_s: float
    hf_cache: Path
    in_kubernetes: bool
    ucx_tls: str = ""
    ucx_net_devices: str = ""
    shared: tuple[Path, ...] = ()
    agent_allow: str = ""
    policy: str = ""
    name_map: Mapping[str, str] = field(default_factory=dict)
    use_ipc_agent: bool = False
    lend_gpus: tuple[str, ...] = ()
    adopt_cluster: bool = False
    route: str = "auto"
    device_budget: int | None = None
    torn: str = "end"
    failpoints: str = ""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token: str = field(default="", repr=False)
    insecure_token: bool = False

    @property
    def ucx(self) -> dict[str, str]:
        """Settings of UCX that are given, by its names without UCX_."""
        given = {"TLS": self.ucx_tls, "NET_DEVICES": self.ucx_net_devices}
        return {name: value for name, value in given.items() if value}

    @property
    def access(self) -> "Access":
        """What is shown to the coordinator."""
        from hotweights.wire.access import Access  # gRPC comes with it, which a process that forks must not have yet

        return Access(self.ca, self.cert, self.key, self.token_file, self.token, self.insecure_token)

    def as_environ(self) -> dict[str, str]:
        """The variables that make a child process read the same settings.

        The token itself is left out: as a variable a child inherits it, and nowhere else may it appear.
        """
        pairs = ",".join(f"{old}={new}" for old, new in self.name_map.items())
        return {
            "HOTWEIGHTS_ENDPOINT": str(self.endpoint) if self.endpoint else "",
            "HOTWEIGHTS_MODEL": self.model,
            "HOTWEIGHTS_NODE": self.node,
            "HOTWEIGHTS_ZONE": self.zone,
            "HOTWEIGHTS_STAGE_DIR": str(self.stage_dir),
            "HOTWEIGHTS_AGENT_SOCKET": str(self.agent_socket),
            "HOTWEIGHTS_AGENT_ALLOW": self.agent_allow,
            "HOTWEIGHTS_LISTEN": self.listen,
            "HOTWEIGHTS_ADVERTISE": self.advertise,
            "HOTWEIGHTS_BUCKET_BYTES": "" if self.bucket_bytes is None else str(self.bucket_bytes),
            "HOTWEIGHTS_BANDWIDTH_MAX": "" if self.bandwidth_max is None else f"{self.bandwidth_max:.0f}B",
            "HOTWEIGHTS_NICE": str(self.nice),
            "HOTWEIGHTS_TRANSPORT": self.transport,
            "HOTWEIGHTS_SHARED": os.pathsep.join(map(str, self.shared)),
            "HOTWEIGHTS_CONNECTIONS": str(self.connections),
            "HOTWEIGHTS_UCX_TLS": self.ucx_tls,
            "HOTWEIGHTS_UCX_NET_DEVICES": self.ucx_net_devices,
            "HOTWEIGHTS_MAX_IMAGES": str(self.max_images),
            "HOTWEIGHTS_AGENT_IDLE_S": str(self.agent_idle_s),
            "HOTWEIGHTS_POLICY": self.policy,
            "HOTWEIGHTS_NAME_MAP": pairs,
            "HOTWEIGHTS_LEND_GPUS": ",".join(self.lend_gpus),
            "HOTWEIGHTS_ROUTE": self.route,
            "HOTWEIGHTS_DEVICE_BUDGET": "" if self.device_budget is None else str(self.device_budget),
            "HOTWEIGHTS_TORN": self.torn,
            "HOTWEIGHTS_CA": str(self.ca or ""),
            "HOTWEIGHTS_CERT": str(self.cert or ""),
            "HOTWEIGHTS_KEY": str(self.key or ""),
            "HOTWEIGHTS_TOKEN_FILE": str(self.token_file or ""),
            "HOTWEIGHTS_INSECURE_TOKEN": str(int(self.insecure_token)),
        }


def _number(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    # [0-9] and few: isdigit() takes what int() does not, as "²", and int() raises for thousands of digits.
    if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise BadSetting(name, text, f"takes a whole number from {low} to {high}")
    return int(text)


def _device_budget(environ: Mapping[str, str]) -> int | None:
    """None where a rank is to look at what is free."""
    name = "HOTWEIGHTS_DEVICE_BUDGET"
    return _number(environ, name, 0, 0, 999_999_999_999) if environ.get(name, "").strip() else None


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise BadSetting(name, text, "takes seconds, for example 300")
    return float(text)


def _name_map(text: str) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        old, separator, new = pair.partition("=")
        if not separator or not old or not new:
            raise BadSetting("HOTWEIGHTS_NAME_MAP", pair, "takes checkpoint=module pairs")
        renamed[old] = new
    return renamed


def _allow(text: str) -> str:
    from hotweights.worker_client.agent.peers import parse_allow

    try:
        parse_allow(text)
    except ValueError as error:
        raise BadSetting("HOTWEIGHTS_AGENT_ALLOW", text, f"{error}; takes UID,@GROUP,...") from error
    return text


def _policy(text: str) -> str:
    if text not in ("", "auto", "manual"):
        raise BadSetting("HOTWEIGHTS_POLICY", text, "takes auto or manual")
    return text


def _bucket_bytes(environ: Mapping[str, str]) -> int | None:
    """None: as build_manifest chooses."""
    name = "HOTWEIGHTS_BUCKET_BYTES"
    return _number(environ, name, 0, 64 << 10, 1 << 30) if environ.get(name) else None


def _bandwidth(text: str) -> float | None:
    """Bytes a second; None is no limit."""
    if not text:
        return None
    parts = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?([KMG]?)B(?:/s)?", text)
    found = float(parts[1]) * _UNITS[parts[2]] if parts else 0.0
    if found < BANDWIDTH_MIN:
        raise BadSetting("HOTWEIGHTS_BANDWIDTH_MAX", text, "takes bytes a second, at least 1MB, for example 200MB")
    return found


def _transport(text: str) -> str:
    if text not in ("auto", "tcp", "ucx", "mpi"):
        raise BadSetting("HOTWEIGHTS_TRANSPORT", text, "takes auto, tcp, ucx or mpi")
    return text


def _shared(text: str) -> tuple[Path, ...]:
    folders = tuple(Path(part.strip()) for part in text.split(os.pathsep) if part.strip())
    for folder in folders:
        if not folder.is_absolute() or folder == Path("/"):
            raise BadSetting("HOTWEIGHTS_SHARED", text, "takes absolute paths of folders, and not / itself")
    return folders


def _gpus(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names != ("all",) and not all(re.fullmatch("GPU-[0-9a-f-]{36}", name) for name in names):
        raise BadSetting("HOTWEIGHTS_LEND_GPUS", text, "takes all, or UUIDs as nvidia-smi -L writes them: GPU-...")
    return tuple(dict.fromkeys(names))


def _route(text: str) -> str:
    if text not in ("auto", "direct", "assembled", "reload"):
        raise BadSetting("HOTWEIGHTS_ROUTE", text, "takes auto, direct, assembled or reload")
    return text


def _torn(text: str) -> str:
    if text not in ("end", "stay"):
        raise BadSetting("HOTWEIGHTS_TORN", text, "takes end or stay")
    return text


def _failpoints(text: str) -> str:
    try:
        parse_failpoints(text)
    except BadFailpoint as error:
        raise BadSetting("HOTWEIGHTS_FAILPOINTS", text, str(error)) from error
    return text


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    """Absolute: an agent that is started in the background has another working directory."""
    text = environ.get(name, "").strip()
    return Path(text).expanduser().absolute() if text else None


def _check_pair(config: Config) -> None:
    for name, given, other, missing in (
        ("HOTWEIGHTS_CERT", config.cert, "HOTWEIGHTS_KEY", config.key),
        ("HOTWEIGHTS_KEY", config.key, "HOTWEIGHTS_CERT", config.cert),
    ):
        if given is not None and missing is None:
            raise BadSetting(name, str(given), f"goes with {other}, which is not set")


def _default_stage() -> Path:
    """A folder of the user's own, in shared memory where there is some (not on macOS).

    Directly: a folder for all users would belong to one of them, who could put others' stages elsewhere.
    """
    memory = "/dev/shm" if sys.platform == "linux" else tempfile.gettempdir()
    return Path(memory) / f"hotweights-{os.getuid()}"


def _hf_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face keeps snapshots, by its own variables."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = environ.get("HF_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"


def load_config(environ: Mapping[str, str] | None = None) -> Config:
    """Reads all settings. Raises BadSetting or BadEndpoint with what to write instead."""
    env = os.environ if environ is None else environ
    endpoint = env.get("HOTWEIGHTS_ENDPOINT") or env.get("HOTWEIGHTS_COORD") or ""
    stage_dir = Path(env.get("HOTWEIGHTS_STAGE_DIR") or _default_stage())
    socket_path = env.get("HOTWEIGHTS_AGENT_SOCKET")
    host = socket.gethostname()
    config = Config(
        endpoint=parse_endpoint(endpoint) if endpoint else None,
        model=env.get("HOTWEIGHTS_MODEL", ""),
        node=env.get("HOTWEIGHTS_NODE") or host,
        zone=env.get("HOTWEIGHTS_ZONE", "").strip(),
        replica=env.get("HOTWEIGHTS_REPLICA", ""),
        stage_dir=stage_dir,
        agent_socket=Path(socket_path) if socket_path else stage_dir / "agent.sock",
        agent_allow=_allow(env.get("HOTWEIGHTS_AGENT_ALLOW", "")),
        listen=env.get("HOTWEIGHTS_LISTEN") or "127.0.0.1:0",
        advertise=env.get("HOTWEIGHTS_ADVERTISE", ""),
        bucket_bytes=_bucket_bytes(env),
        bandwidth_max=_bandwidth(env.get("HOTWEIGHTS_BANDWIDTH_MAX", "").strip()),
        nice=_number(env, "HOTWEIGHTS_NICE", 0, 0, 19),
        transport=_transport(env.get("HOTWEIGHTS_TRANSPORT") or "auto"),
        connections=_number(env, "HOTWEIGHTS_CONNECTIONS", 2, 1, 8),
        ucx_tls=env.get("HOTWEIGHTS_UCX_TLS", "").strip(),
        ucx_net_devices=env.get("HOTWEIGHTS_UCX_NET_DEVICES", "").strip(),
        shared=_shared(env.get("HOTWEIGHTS_SHARED", "")),
        max_images=_number(env, "HOTWEIGHTS_MAX_IMAGES", 2, 1, 1000),
        agent_idle_s=_seconds(env, "HOTWEIGHTS_AGENT_IDLE_S", 300.0),
        hf_cache=_hf_cache(env),
        in_kubernetes=bool(env.get("KUBERNETES_SERVICE_HOST")),
        policy=_policy(env.get("HOTWEIGHTS_POLICY", "")),
        name_map=_name_map(env.get("HOTWEIGHTS_NAME_MAP", "")),
        use_ipc_agent=env.get("HOTWEIGHTS_USE_IPC_AGENT", "").lower() in _TRUE,
        lend_gpus=_gpus(env.get("HOTWEIGHTS_LEND_GPUS", "")),
        adopt_cluster=env.get("HOTWEIGHTS_ADOPT_CLUSTER", "").lower() in _TRUE,
        route=_route(env.get("HOTWEIGHTS_ROUTE") or "auto"),
        device_budget=_device_budget(env),
        torn=_torn(env.get("HOTWEIGHTS_TORN") or "end"),
        failpoints=_failpoints(env.get("HOTWEIGHTS_FAILPOINTS", "")),
        ca=_file(env, "HOTWEIGHTS_CA"),
        cert=_file(env, "HOTWEIGHTS_CERT"),
        key=_file(env, "HOTWEIGHTS_KEY"),
        token_file=_file(env, "HOTWEIGHTS_TOKEN_FILE"),
        token=env.get("HOTWEIGHTS_TOKEN", "").strip(),
        insecure_token=env.get("HOTWEIGHTS_INSECURE_TOKEN", "").lower() in _TRUE,
    )
    _check_pair(config)
    return config
