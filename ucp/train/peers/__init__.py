"""Memory of other ranks as a store: whatever reads checkpoints reads from the memory of a running job as well.

One server per rank offers bytes of its memory to those who know its secret; a store reads them by rank and address.
"""

from ucp.train.peers.memory import Memory
from ucp.train.peers.server import Address, MemoryServer
from ucp.train.peers.store import PeersStore, object_of

__all__ = ["Address", "Memory", "MemoryServer", "PeersStore", "object_of"]
