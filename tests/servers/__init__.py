"""Real object stores on loopback, and a proxy that injects faults between them and a client."""

from tests.servers.endpoint import Endpoint
from tests.servers.kinds import SERVERS, missing
from tests.servers.proxy import Proxy
from tests.servers.server import Server, running
from tests.servers.shared import shared

__all__ = ["SERVERS", "Endpoint", "Proxy", "Server", "missing", "running", "shared"]
