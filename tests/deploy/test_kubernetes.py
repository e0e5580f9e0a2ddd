"""deploy/kubernetes: what the API server would take, and what our own programs would."""

import contextlib
import dataclasses
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.certificates import Authority, Files, contexts

from hotweights.cli.main import build_parser
from hotweights.coordinator.config import Config as CoordinatorConfig
from hotweights.wire.endpoint import parse_endpoint
from hotweights.worker_client.config import SETTINGS, load_config

from .buildah import REPO, USER

FOLDER = REPO / "deploy" / "kubernetes"
README = REPO / "deploy" / "README.md"
VALIDATE = REPO / ".venv-tools" / "bin" / "kubernetes-validate"
# The oldest that has native sidecars, and the newest whose schemas there are.
VERSIONS = ("1.29.0", "1.37.0")
HAS_TLS = "HOTWEIGHTS_CA" in {setting.name for setting in SETTINGS}
VARIANTS = ("plain", "tls")


def read(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.yaml"))


@pytest.fixture(params=VARIANTS)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """The manifests, as they are and with TLS switched on by the README's own line."""
    shutil.copytree(FOLDER, tmp_path / "deploy" / "kubernetes")
    if request.param == "tls":
        (line,) = re.findall(r"^sed .*$", README.read_text(), re.MULTILINE)
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=30)
        assert not re.search(r"#tls |#plain|--insecure|tcp://hot", read(tmp_path)), "not all of it"
    return sorted((tmp_path / "deploy" / "kubernetes").iterdir())


@pytest.fixture
def ours(request: pytest.FixtureRequest, resources: list[Any]) -> list[Any]:
    """The resources, where our programs can be asked about them."""
    if not HAS_TLS and "[tls]" in request.node.name:
        pytest.skip("the programs have no TLS yet")
    return resources


@pytest.fixture
def resources(files: list[Path]) -> list[Any]:
    return [resource for path in files for resource in yaml.safe_load_all(path.read_text())]


def validated(*files: Path) -> "subprocess.CompletedProcess[str]":
    versions = [part for version in VERSIONS for part in ("--kubernetes-version", version)]
    arguments = [str(VALIDATE), "--strict", *versions, *map(str, files)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)


def containers(resources: list[Any]) -> Iterator[Any]:
    for resource in resources:
        pod = resource["spec"]["template"]["spec"] if "template" in resource.get("spec", {}) else {}
        yield from pod.get("initContainers", []) + pod.get("containers", [])


def settings_of(container: Any, resources: list[Any]) -> dict[str, str]:
    """The environment as the kubelet would make it; what only the cluster knows is called by the field's path."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        (settings,) = (r for r in resources if r["kind"] == "ConfigMap" and r["metadata"]["name"] == name)
        found |= settings["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value") or variable["valueFrom"]["fieldRef"]["fieldPath"]
    return {name: re.sub(r"\$\((\w+)\)", lambda other: found[other[1]], value) for name, value in found.items()}


def test_every_resource_passes_the_schema_of_the_oldest_and_the_newest_kubernetes(
    files: list[Path], resources: list[Any]
) -> None:
    done = validated(*files)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^INFO .* passed for ", done.stdout, re.MULTILINE)) == len(resources) * len(VERSIONS)


def test_a_field_that_there_is_not_is_told(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((FOLDER / "engine.yaml").read_text().replace("restartPolicy: Always", "restartPolice: Always"))
    done = validated(wrong)
    assert done.returncode == 1
    assert "restartPolice" in done.stdout


def test_a_field_of_the_wrong_kind_is_told(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((FOLDER / "coordinator.yaml").read_text().replace("grpc: {port: 5555}", "grpc: {port: grpc}"))
    assert validated(wrong).returncode == 1


def test_every_setting_is_one_that_is_read(ours: list[Any]) -> None:
    named = {name for c in containers(ours) for name in settings_of(c, ours) if name.startswith("HOTWEIGHTS")}
    assert {"HOTWEIGHTS_STAGE_DIR", "HOTWEIGHTS_REPLICA", "HOTWEIGHTS_NODE"} <= named
    assert named <= {setting.name for setting in SETTINGS}


def test_agent_and_engine_read_the_same_stage_socket_and_coordinator(ours: list[Any]) -> None:
    agent, engine = (
        load_config({**settings_of(c, ours), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        for c in containers(ours)
        if c["name"] in ("agent", "engine")
    )
    for name in ("stage_dir", "agent_socket", "endpoint", "model", "node"):
        assert getattr(agent, name) == getattr(engine, name), name
    assert agent.endpoint is not None
    assert not agent.endpoint.is_loopback
    assert agent.in_kubernetes
    assert engine.replica
    (agents,) = (r for r in ours if r["kind"] == "Service" and r["spec"].get("clusterIP") == "None")
    (port,) = (port["port"] for port in agents["spec"]["ports"])
    assert agent.advertise == f"{agent.node}.{agents['metadata']['name']}.metadata.namespace.svc:{port}"
    assert agent.listen == f"0.0.0.0:{port}"
    # The stage lies in the volume, but is not its root, which belongs to another user.
    assert Path("/stage") in agent.stage_dir.parents


def handshake(files: Files, name: str) -> None:
    """In memory, as a reader with the source of that name. Raises SSLCertVerificationError."""
    tls = contexts(files, files, trusts=files.ca)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls.server().wrap_bio(to_server, to_client, server_side=True)
    client = tls.client().wrap_bio(to_client, to_server, server_hostname=name)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.getpeercert()
    assert server.getpeercert()


def test_the_certificates_that_the_page_asks_for_are_good_for_the_names_that_are_advertised(tmp_path: Path) -> None:
    """Certificates are matched by OpenSSL, which has rules of its own for wildcards."""
    resources = [resource for path in sorted(FOLDER.iterdir()) for resource in yaml.safe_load_all(path.read_text())]
    (agent,) = (c for c in containers(resources) if c["name"] == "agent")
    in_pod = {"metadata.namespace": "serving", "metadata.name": "vllm-0"}
    advertised = settings_of(agent, resources)["HOTWEIGHTS_ADVERTISE"]
    for field, value in in_pod.items():
        advertised = advertised.replace(field, value)
    text = " ".join(README.read_text().split())
    (theirs, workers) = re.findall(r"certificate is for (.*?), the workers' for `([^`]+)`", text)[0]
    authority = Authority(tmp_path)
    handshake(authority.issue("workers", workers.replace("NAMESPACE", "serving")), advertised.partition(":")[0])
    names = re.findall("`([^`]+)`", theirs)
    assert names == ["hotweights-coordinator", "localhost"]
    for name in names:
        handshake(authority.issue("coordinator", *names), name)


def test_nothing_says_cleartext_where_tls_is_switched_on(files: list[Path]) -> None:
    tls = any("HOTWEIGHTS_CA" in path.read_text() and "#tls" not in path.read_text() for path in files)
    assert any("h2c" in path.read_text() for path in files) is not tls


def test_our_programs_take_their_arguments(ours: list[Any]) -> None:
    commands = [c["args"] for c in containers(ours) if c.get("args", [""])[0] == "hotweights"]
    assert [arguments[1] for arguments in commands] == ["coord-serve", "agent"]
    for arguments in commands:
        build_parser().parse_args(arguments[1:])  # exits where it cannot


def test_the_coordinator_may_listen_where_it_is_told(ours: list[Any]) -> None:
    (serve,) = (c for c in containers(ours) if c["name"] == "coordinator")
    given = build_parser().parse_args(serve["args"][1:])
    endpoint = parse_endpoint(given.endpoint)
    options = {field.name for field in dataclasses.fields(CoordinatorConfig)} & vars(given).keys() - {"endpoint"}
    CoordinatorConfig(endpoint, **{name: getattr(given, name) for name in options}).check()
    assert {port["containerPort"] for port in serve["ports"]} == {endpoint.port}


def test_nothing_runs_as_root_or_may_become_it(resources: list[Any]) -> None:
    pods = [r["spec"]["template"]["spec"] for r in resources if r["kind"] == "StatefulSet"]
    assert len(pods) == 2
    for pod in pods:
        # The image's own user; agent and engine share one, for the stage and the socket are for their owner only.
        assert pod["securityContext"]["runAsUser"] == USER
        assert pod["securityContext"]["runAsNonRoot"]
    for container in containers(resources):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_agent_and_engine_share_memory_and_see_the_models_at_the_same_path(resources: list[Any]) -> None:
    (engines,) = (r for r in resources if r["kind"] == "StatefulSet" and r["metadata"]["name"] == "vllm")
    pod = engines["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["stage"]["emptyDir"]["medium"] == volumes["shm"]["emptyDir"]["medium"] == "Memory"
    (agent,), (engine,) = pod["initContainers"], pod["containers"]
    in_agent, in_engine = ({m["name"]: m["mountPath"] for m in c["volumeMounts"]} for c in (agent, engine))
    assert (in_agent["stage"], in_agent["models"]) == (in_engine["stage"], in_engine["models"])
    assert set(in_agent) | set(in_engine) <= set(volumes)
    assert agent["restartPolicy"] == "Always"
