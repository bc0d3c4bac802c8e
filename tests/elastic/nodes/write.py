"""A writer that is a process of its own and stops in the middle of an object, to be killed there.

``python -m tests.elastic.nodes.write FOLDER HOST PORT SECRET SIZE WRITTEN``
"""

from __future__ import annotations

import sys

from ucp.elastic.nodes import Address, NodeFolder, NodesStore, RemoteNode


def main(folder: str, host: str, port: str, secret: str, size: str, written: str) -> None:
    """Write to the node of the folder and to the one at the address, some of the bytes, and wait."""
    other = RemoteNode("b", Address(host, int(port), bytes.fromhex(secret)))
    store = NodesStore("a", {"a": NodeFolder(folder), "b": other}, copies=2)
    store.put("before", b"1")
    writer = store.create("object", int(size))
    writer.write_at(0, bytes(int(written)))
    print("written", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
