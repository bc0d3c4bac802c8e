"""The folder of a node, the same seen from another node, and those of several nodes: all are stores like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.elastic.nodes.conftest import Nodes
from ucp.elastic.nodes import NodeFolder, NodesStore, RemoteNode
from ucp.testing.stores import StoreConformance


class TestFolder(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> NodeFolder:
        (tmp_path / "node").mkdir()
        return NodeFolder(str(tmp_path / "node"))


class TestRemote(StoreConformance):
    @pytest.fixture
    def store(self, make_nodes: Callable[[int], Nodes]) -> Iterator[RemoteNode]:
        store = make_nodes(1).remote("a")
        yield store
        store.close()


class TestNodes(StoreConformance):
    @pytest.fixture
    def store(self, make_nodes: Callable[[int], Nodes]) -> NodesStore:
        return make_nodes(3).store("b")


class TestOneNode(StoreConformance):
    @pytest.fixture
    def store(self, make_nodes: Callable[[int], Nodes]) -> NodesStore:
        return make_nodes(1).store()
