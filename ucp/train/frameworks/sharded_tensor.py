"""torch's ShardedTensor, in which FSDP1's sharded state dicts are unless it was made with a device mesh.

Facts from torch/distributed/_shard/sharded_tensor/api.py: ``local_shards()`` are tensors with the offsets and sizes of
their boxes of the whole, none on a rank that has nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch

from ucp.layout import Box, Shape
from ucp.train.held import Held, in_parts
from ucp.train.shards import Part, local_tensor
from ucp.train.targets import Targets


def add_sharded(found: Targets, name: str, state: str, tensor: Any) -> None:
    """Ask for a state of a tensor in all its local shards."""
    shape: Shape = tuple(tensor.size())
    for shard in tensor.local_shards():
        region = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        parts = [Part(region, Box.whole(region.shape))] if region.size else []
        memory = local_tensor(shard.tensor, name)
        found.add(name, state, shard.tensor, placed=in_parts(shape, memory, parts))
    if not tensor.local_shards():
        nothing = torch.empty(0, dtype=tensor.dtype)
        found.add(name, state, nothing, placed=Held(shape, nothing, ()))
