"""The Dockerfile without Docker: mmdebstrap makes a base root, buildah builds and runs in it, with no daemon.

    mmdebstrap --> base root --> buildah build Dockerfile --> image --> buildah run, in a network namespace of its own

Everything lies in one folder that the test removes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
BASE, IMAGE = "localhost/base", "localhost/hotweights"
VLLM_BASE, ENGINE_IMAGE = "localhost/vllm", "localhost/hotweights-vllm"
BUILD_DEADLINE_S = 400.0
WAIT_S = 60.0
USER = 10001
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_TOOLS = ("mmdebstrap", "buildah", "unshare", "nsenter", "ip")


def why_not() -> str:
    """Why containers cannot be tested here; empty where they can."""
    if os.geteuid():
        return "needs root: buildah's chroot isolation mounts"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed: make test-container, or scripts/container.sh"
    if "ID=debian\n" not in Path("/etc/os-release").read_text():
        return "makes its base root from this machine's packages, which are not Debian's"
    return ""


def checked(arguments: Sequence[str], deadline_s: float = WAIT_S, environment: Mapping[str, str] | None = None) -> str:
    """The stdout of a command that must succeed."""
    done = subprocess.run(
        [*arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=deadline_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Buildah:
    """Storage of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._command = ("buildah", "--root", f"{folder}/storage", "--runroot", f"{folder}/run")
        self.environment = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *arguments: str, deadline_s: float = WAIT_S) -> str:
        return checked(self.argv(*arguments), deadline_s, self.environment).strip()

    def argv(self, *arguments: str) -> list[str]:
        return [*self._command, *arguments]

    def popen(self, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("ab") as output:
            return subprocess.Popen(
                [*arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )

    def make_base(self) -> None:
        """A Debian with Python, by this machine's apt.

        It has this machine's certificates and pip configuration: the Dockerfile is told nothing of mirrors.
        """
        suite = next(
            line.partition("=")[2]
            for line in Path("/etc/os-release").read_text().splitlines()
            if line.startswith("VERSION_CODENAME=")
        )
        container = self("from", "scratch")
        root = self("mount", container)
        packages = "--include=python3,python3-venv,ca-certificates"
        checked(["mmdebstrap", "--quiet", "--variant=minbase", packages, suite, root], BUILD_DEADLINE_S)
        shutil.copyfile(_CERTIFICATES, root + str(_CERTIFICATES))
        Path(root, "etc/pip.conf").write_text(_pip_configuration())
        self("commit", "--quiet", "--rm", container, BASE, deadline_s=BUILD_DEADLINE_S)

    def build(self) -> None:
        # Docker's own format: the other one has no HEALTHCHECK.
        options = ("--quiet", "--format", "docker", "--build-arg", f"PYTHON={BASE}", "--tag", IMAGE)
        self("build", *options, str(REPO), deadline_s=BUILD_DEADLINE_S)

    def build_engine(self) -> None:
        """deploy/engine.Dockerfile, on a stand-in for vLLM's image: a Python environment that comes first on PATH."""
        container = self("from", BASE)
        self("run", container, "--", "python3", "-m", "venv", "/opt/venv", deadline_s=BUILD_DEADLINE_S)
        self("config", "--env", "PATH=/opt/venv/bin:/usr/bin:/bin", container)
        self("commit", "--quiet", "--rm", container, VLLM_BASE, deadline_s=BUILD_DEADLINE_S)
        file = str(REPO / "deploy" / "engine.Dockerfile")
        options = ("--quiet", "--build-arg", f"VLLM={VLLM_BASE}", "--file", file, "--tag", ENGINE_IMAGE)
        self("build", *options, str(REPO), deadline_s=BUILD_DEADLINE_S)

    def configuration(self) -> Any:
        """What the image says of itself: User, Cmd, Healthcheck and so on."""
        return json.loads(self("inspect", "--type", "image", IMAGE))["Docker"]["config"]

    def size_bytes(self, image: str) -> int:
        root = self("mount", container := self("from", image))
        size = int(checked(["du", "--summarize", "--bytes", "--one-file-system", root]).split()[0])
        self("rm", container)
        return size


def _pip_configuration() -> str:
    """This machine's indexes and certificate, as far as they mean something elsewhere."""
    lines = checked(["python3", "-m", "pip", "config", "list"]).splitlines()
    found = {"cert": str(_CERTIFICATES)}
    for line in lines:
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "trusted-host") and "file:" not in value:
            found[key] = value.strip("'")
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())


@contextlib.contextmanager
def built() -> Iterator[Buildah]:
    """The image, and storage that is gone afterwards; in memory, since every container is a copy of a whole root."""
    folder = Path(tempfile.mkdtemp(prefix="hotweights-container-", dir="/dev/shm"))
    buildah = Buildah(folder)
    try:
        buildah.make_base()
        buildah.build()
        yield buildah
    finally:
        buildah("rm", "--all")
        shutil.rmtree(folder)
