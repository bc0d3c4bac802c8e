"""The fixture that hands tests their servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.servers.endpoint import Endpoint
from tests.servers.kinds import SERVERS
from tests.servers.server import Server
from tests.servers.shared import shared

REQUIRED = "UCP_TEST_SERVERS_REQUIRED"
"""Set where a server that is not installed is a failure, as in CI."""


def server_kind(name: str) -> type[Server]:
    """A kind of server by name; the test is skipped, or fails where servers are required, if it is not installed."""
    kind = SERVERS[name]
    if reason := kind.missing():
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return kind


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Endpoint]]:
    """``served("ceph")`` is the endpoint of a server that all processes of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with ExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}

        def served(name: str) -> Endpoint:
            if name not in endpoints:
                endpoints[name] = stack.enter_context(shared(server_kind(name), folder / "servers"))
            return endpoints[name]

        yield served
