"""Folders of the nodes of a job, in memory or on disk, as one store: what a node loses, others have.

A store of this kind holds ordinary objects in ordinary folders: it is for checkpoints that must be quick to write and
to read again, and that may be gone with the nodes that hold them.
"""

from ucp.elastic.nodes.client import RemoteNode
from ucp.elastic.nodes.folder import NodeFolder, folder_of, node_name
from ucp.elastic.nodes.join import JoinedNodes, join
from ucp.elastic.nodes.placement import buddies
from ucp.elastic.nodes.server import Address, NodeServer
from ucp.elastic.nodes.store import NodesStore

__all__ = [
    "Address",
    "JoinedNodes",
    "NodeFolder",
    "NodeServer",
    "NodesStore",
    "RemoteNode",
    "buddies",
    "folder_of",
    "join",
    "node_name",
]
