"""A node that is a process of its own: ``python -m tests.elastic.nodes.serve FOLDER HOST`` tells its address."""

from __future__ import annotations

import json
import signal
import sys

from ucp.elastic.nodes import NodeFolder, NodeServer


def main(folder: str, host: str) -> None:
    """Serve until killed, or until the parent, which holds the other end of the input, is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = NodeServer(NodeFolder(folder), host)
    print(json.dumps([server.address.host, server.address.port, server.address.secret.hex()]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
