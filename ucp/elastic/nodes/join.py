"""How the nodes of a job find each other: collective, once after every start of the job."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ucp.elastic.nodes.client import RemoteNode
from ucp.elastic.nodes.folder import PARTIAL, NodeFolder, folder_of, node_name
from ucp.elastic.nodes.link import TIMEOUT_SECONDS
from ucp.elastic.nodes.member import Member
from ucp.elastic.nodes.server import Address, NodeServer
from ucp.elastic.nodes.store import NodesStore
from ucp.errors import UsageError
from ucp.store import OPENERS, Store
from ucp.train.peers.server import own_address

if TYPE_CHECKING:
    from ucp.train.crew import Crew

T = TypeVar("T")
_LOG = logging.getLogger("ucp")


class JoinedNodes(NodesStore):
    """The nodes of a job while this rank takes part; the lowest rank of each, which `leads`, serves its folder."""

    def __init__(
        self, me: str, members: dict[str, Member], *, copies: int, name: str, server: NodeServer | None, leads: bool
    ) -> None:
        super().__init__(me, members, copies=copies, url=f"nodes://{name}")
        self.leads, self._server = leads, server
        self.tend(self.nodes)

    def leave(self) -> None:
        """Serve no longer, and be no longer what the URL means. Others go on to other nodes that have copies."""
        if _JOINED.get(self._name) is self:
            del _JOINED[self._name]
        if self._server is not None:
            self._server.close()
        self.close()

    def tend(self, active: Iterable[str]) -> None:
        super().tend(active)
        if not self.leads:
            self.tended = ()

    def remove(self) -> None:
        """Delete this node's folder, with all that is in it."""
        shutil.rmtree(self.folder.top, ignore_errors=True)
        with suppress(OSError):  # others of this job, or other jobs, have theirs there
            os.rmdir(os.path.dirname(self.folder.top))
            os.rmdir(os.path.dirname(os.path.dirname(self.folder.top)))

    @property
    def _name(self) -> str:
        return self.url.removeprefix("nodes://").partition("/")[0]


_JOINED: dict[str, JoinedNodes] = {}
"""What URLs mean, by the name that follows ``nodes://``."""


def join(
    root: str, job: str, *, copies: int = 2, group: Any = None, name: str = "memory", timeout: float = TIMEOUT_SECONDS
) -> JoinedNodes:
    """The folders ``<root>/ucp-<uid>/<job>/<node>`` of all nodes of `group` as one store. Collective.

    All ranks with the same `node_name` share a folder, which their lowest one serves to other nodes. What killed
    writers have left there is removed. From then on ``nodes://<name>/…`` is a URL in this process.

    `copies` nodes have each object, or all where there are fewer, which the log tells. `timeout` is in seconds: a node
    that sends no byte for so long counts as gone.

    UsageError on all ranks if two machines have the same node name, UnsafeError if a folder is another user's.
    """
    from ucp.train.crew import Crew

    crew = Crew.of(group)
    hellos = _share(crew, lambda: _Hello.of(root, job))
    mine = hellos[crew.rank]
    lowest = {hello.node: rank for rank, hello in reversed(list(enumerate(hellos)))}
    leads = lowest[mine.node] == crew.rank
    opened: list[NodeServer] = []
    try:
        places = _share(crew, lambda: _open(mine, hellos, opened) if leads else None)
        _share(crew, lambda: _check_shared(mine, places, lowest[mine.node]))
    except BaseException:
        for server in opened:
            server.close()
        raise
    own = NodeFolder(mine.folder)
    members: dict[str, Member] = {mine.node: own}
    for node, rank in lowest.items():
        place = places[rank]
        if node != mine.node and place is not None and place.address is not None:
            members[node] = RemoteNode(node, place.address, timeout=timeout)
    if copies > len(members) and crew.rank == 0:
        _LOG.warning("%s: %d copies are asked for, and there are %d nodes: each has one", name, copies, len(members))
    store = JoinedNodes(mine.node, members, copies=copies, name=name, server=opened[0] if opened else None, leads=leads)
    before = _JOINED.get(name)
    if before is not None:
        before.leave()
    _JOINED[name] = store
    return store


@dataclass(frozen=True, slots=True)
class _Hello:
    """What a rank says of its node, its folder, and the address by which it thinks that others reach it."""

    node: str
    folder: str
    host: str

    @classmethod
    def of(cls, root: str, job: str) -> _Hello:
        node = node_name()
        return cls(node, folder_of(root, job, node), own_address())


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node's server is, if it needs one, and a name in its folder that nobody else can have made."""

    address: Address | None
    token: str


def _open(mine: _Hello, hellos: Sequence[_Hello], opened: list[NodeServer]) -> _Place:
    folder = NodeFolder(mine.folder)
    folder.tidy()
    token = secrets.token_hex(16)
    folder.make_folder(os.path.join(folder.top, PARTIAL, token))
    if all(hello.node == mine.node for hello in hellos):
        return _Place(None, token)
    opened.append(NodeServer(folder, _reachable(mine, hellos)))
    return _Place(opened[0].address, token)


def _reachable(mine: _Hello, hellos: Sequence[_Hello]) -> str:
    """An address of this node that the others can use: not one of its own only, unless all have such a one.

    The leader of a job may find itself by a name that the host keeps for itself.
    """
    others = [hello.host for hello in hellos if hello.node != mine.node and not _is_loopback(hello.host)]
    if not _is_loopback(mine.host) or not others:
        return mine.host
    family = socket.AF_INET6 if ":" in others[0] else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((others[0], 9))  # sends nothing: it only asks which way packets would go
        return str(probe.getsockname()[0])
    return mine.host


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _check_shared(mine: _Hello, places: Sequence[_Place | None], leader: int) -> None:
    place = places[leader]
    assert place is not None, "the lowest rank of a node has opened its folder"
    if not os.path.isdir(os.path.join(mine.folder, PARTIAL, place.token)):
        raise UsageError(
            f"two machines, or containers that do not share {mine.folder}, both are node {mine.node!r}",
            hint="give each its own name in UCP_NODE",
        )


def _share(crew: Crew, work: Callable[[], T]) -> list[T]:
    """What `work` makes on every rank, by rank; what it raises on one, all raise."""
    return crew.share(lambda: (None, work()))[1]


def _opened(url: str) -> Store:
    name, _, path = url.removeprefix("nodes://").rstrip("/").partition("/")
    store = _JOINED.get(name)
    if store is None:
        known = ", ".join(f"nodes://{one}" for one in _JOINED) or "none"
        raise UsageError(
            f"{url}: this process has joined no nodes of that name ({known})", hint="ucp.elastic joins them"
        )
    return store.child(path) if path else store


OPENERS["nodes"] = _opened

__all__ = ["JoinedNodes", "join"]
