"""Nodes that are network namespaces of this machine, each on a link of limited rate to one bridge. Needs root.

namespace hw-N --veth, tc tbf both ways--> bridge hw-bridge, which has the machine's own address
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BRIDGE = "hwbr0"
NETWORK = "10.177.0"
HERE = f"{NETWORK}.254"
BURST_BYTES = 256 << 10  # so that large segments are not cut up: on a virtual machine a timer for every packet is dear
QUEUE_MS = 50


class NoNamespaces(Exception):
    """They cannot be made here; the text says why."""


@dataclass(frozen=True)
class Node:
    """One of them."""

    name: str
    address: str

    def command(self, arguments: list[str]) -> list[str]:
        """What runs it in there."""
        return ["ip", "netns", "exec", self.name, *arguments]


def check() -> None:
    """Raises NoNamespaces."""
    if os.geteuid() != 0:
        raise NoNamespaces("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NoNamespaces(f"there is no {tool} here (iproute2)")


@contextmanager
def nodes(count: int, mbit: float) -> Iterator[list[Node]]:
    """Each sends and receives at most `mbit` Mbit/s. They are gone afterwards. Raises NoNamespaces."""
    check()
    made = [Node(f"hw{number}", f"{NETWORK}.{number + 1}") for number in range(count)]
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{HERE}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for node in made:
            _connect(node, mbit)
        yield made
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
    finally:
        for node in made:
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", node.name)
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", BRIDGE)


def _connect(node: Node, mbit: float) -> None:
    outside, inside = f"{node.name}-out", f"{node.name}-in"
    _run("ip", "netns", "add", node.name)
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", node.name)
    _run("ip", "link", "set", outside, "master", BRIDGE, "up")
    for command in (("addr", "add", f"{node.address}/24", "dev", inside), ("link", "set", inside, "up")):
        _run(*node.command(["ip", *command]))
    _run(*node.command(["ip", "link", "set", "lo", "up"]))
    limit = ("root", "tbf", "rate", f"{mbit:g}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")
    _run("tc", "qdisc", "add", "dev", outside, *limit)
    _run(*node.command(["tc", "qdisc", "add", "dev", inside, *limit]))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
