"""The servers there are, by name."""

from __future__ import annotations

from tests.servers.azurite import Azurite
from tests.servers.ceph import Ceph
from tests.servers.gcs import GcsEmulator
from tests.servers.moto import Moto
from tests.servers.nginx import Nginx
from tests.servers.server import Server
from tests.servers.swift import Swift

SERVERS: dict[str, type[Server]] = {kind.name: kind for kind in (Moto, Ceph, Swift, Azurite, GcsEmulator, Nginx)}


def missing(name: str) -> str:
    """Why a server cannot start here; "" if it can."""
    return SERVERS[name].missing()
