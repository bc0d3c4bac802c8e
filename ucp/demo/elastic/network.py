"""Nodes with addresses of their own: network namespaces on a bridge, whose links can be cut."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable

from ucp.errors import UcpError, UsageError

INTERFACE = "eth0"
"""The interface of a node in its namespace."""


def can_divide() -> bool:
    """Whether this process may make network namespaces: Linux, with the rights of an administrator, and iproute2."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return False
    probe = f"ucpt{random.getrandbits(32):08x}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
    linked = made and _try("link", "add", probe, "type", "bridge")
    for what in ("link", "netns"):
        _try(what, "del", probe)
    return linked


class Network:
    """A bridge, and a namespace for each node of a cluster.

    `remember` is told what to remove at the end (``netns NAME``, ``link NAME``) before it is made.
    """

    def __init__(self, name: str, *, remember: Callable[[str], None]) -> None:
        self._name, self._remember = name[:6], remember
        self._bridge = f"ucp{self._name}"
        self._subnet = _free_subnet()
        self._numbers: dict[str, int] = {}
        remember(f"link {self._bridge}")
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    @property
    def host(self) -> str:
        """Address of this machine as the nodes see it."""
        return f"{self._subnet}.1"

    def address(self, node: str) -> str:
        """Address of `node`, for which a namespace is made the first time."""
        if node not in self._numbers:
            self._numbers[node] = len(self._numbers) + 2
            self._add(node)
        return f"{self._subnet}.{self._numbers[node]}"

    def inside(self, node: str) -> list[str]:
        """What to put before a command so that it runs on `node`."""
        return ["ip", "netns", "exec", self._namespace(node)]

    def cut(self, node: str) -> None:
        """From now on nothing that `node` sends arrives, nor does it get anything; nobody is told."""
        _ip("link", "set", self._port(node), "down")

    def heal(self, node: str) -> None:
        """The link is as it was before `cut`."""
        _ip("link", "set", self._port(node), "up")

    def _add(self, node: str) -> None:
        space, port = self._namespace(node), self._port(node)
        self._remember(f"netns {space}")
        _ip("netns", "add", space)
        _ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", space)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{self._subnet}.{self._numbers[node]}/24", "dev", INTERFACE)
        _ip("-n", space, "link", "set", INTERFACE, "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _namespace(self, node: str) -> str:
        return f"ucp-{self._name}-{node}"

    def _port(self, node: str) -> str:
        return f"u{self._name}-{self._numbers[node]}"


def _free_subnet() -> str:
    used = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=False).stdout
    for _ in range(100):
        subnet = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
        if f" {subnet}." not in used:
            return subnet
    raise UsageError("no free subnet for the nodes of the cluster")


def _try(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UcpError(
            f"ip {' '.join(words)}: {done.stderr.strip()}", hint="nodes without networks of their own need no rights"
        )
