"""What each tensor-parallel rank of transformers holds, by its own code, on a process group that never talks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.configuration_utils import DistributedConfig


def shards(model_class: Any, folder: Path, *, tp: int) -> dict[int, dict[str, Any]]:
    """The local tensors of every rank, of the model saved in `folder`, as arrays."""
    return {rank: _held(model_class, folder, rank=rank, tp=tp) for rank in range(tp)}


def _held(model_class: Any, folder: Path, *, rank: int, tp: int) -> dict[str, Any]:
    with _alone(rank, tp):
        model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=tp))
        return {name: _local(tensor) for name, tensor in model.state_dict().items()}


def _local(tensor: torch.Tensor) -> Any:
    local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
    return local.detach().clone().numpy()


@contextmanager
def _alone(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
