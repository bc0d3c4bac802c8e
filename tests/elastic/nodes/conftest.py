"""Nodes of a job that are folders and servers of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ucp.elastic.nodes import NodeFolder, NodeServer, NodesStore, RemoteNode


class Nodes:
    """Nodes ``a``, ``b``, … each with a folder and a server; `store` is what a rank of one of them has."""

    def __init__(self, root: Path, count: int) -> None:
        self.names = [chr(ord("a") + number) for number in range(count)]
        self.folders = {name: NodeFolder(str(root / name)) for name in self.names}
        for name in self.names:
            (root / name).mkdir(parents=True, exist_ok=True)
        self.servers = {name: NodeServer(self.folders[name], "127.0.0.1") for name in self.names}
        self._stores: list[NodesStore] = []

    def remote(self, name: str, timeout: float = 20.0) -> RemoteNode:
        """A node, as others see it."""
        return RemoteNode(name, self.servers[name].address, timeout=timeout)

    def store(self, me: str = "a", copies: int = 2, timeout: float = 20.0) -> NodesStore:
        """The store of a rank on node `me`."""
        others = {name: self.remote(name, timeout) for name in self.names if name != me}
        store = NodesStore(me, {me: NodeFolder(self.folders[me].root), **others}, copies=copies)
        self._stores.append(store)
        return store

    def close(self) -> None:
        """Stop all."""
        for store in self._stores:
            store.close()
        for server in self.servers.values():
            server.close()


@pytest.fixture
def make_nodes(tmp_path: Path) -> Iterator[Callable[[int], Nodes]]:
    """Makes so many nodes."""
    made: list[Nodes] = []

    def make(count: int) -> Nodes:
        made.append(Nodes(tmp_path / f"nodes{len(made)}", count))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()
