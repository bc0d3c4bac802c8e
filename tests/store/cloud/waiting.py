"""The proxy notes an exchange when it is over, which the client may know before."""

from __future__ import annotations

import time

from tests.servers.proxy import Exchange, Proxy


def seen(proxy: Proxy, count: int) -> list[Exchange]:
    """The exchanges, when there are `count`, or what there is after a while."""
    until = time.monotonic() + 60
    while len(proxy.exchanges) < count and time.monotonic() < until:
        time.sleep(0.01)
    return proxy.exchanges
