"""PyTorch's writer for Hugging Face folders on real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {"embed.weight": (11, 6), "blocks.0.w": (7, 5), "blocks.0.b": (5,), "scale": (1,), "blocks.1.w": (8, 3)}


def truth() -> dict[str, Tensor]:
    """Whole tensors by name, of several dtypes."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["blocks.1.w"] = made["blocks.1.w"].bfloat16()
    return made


def save(rank: int, world: int, folder: str, options: dict[str, Any]) -> None:
    """Save `truth`, sharded over the ranks, as `options` of the writer say; integers beside where it can."""
    import warnings

    from torch.distributed import checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, Any] = {}
    for name, tensor in truth().items():
        placement = Replicate() if name == "scale" else Shard(1 if name == "blocks.1.w" else 0)
        state[name] = distribute_tensor(tensor, mesh, [placement]) if world > 1 else tensor
    if not options.get("enable_consolidation"):
        state["count"] = torch.tensor([7, 8])
    if options.get("fqn_to_index_mapping"):
        options["fqn_to_index_mapping"] = {name: 1 + number % 2 for number, name in enumerate(state)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(folder, **options), no_dist=False)


def folder_of(path: Path, world: int, **options: Any) -> Path:
    """A folder that `world` ranks wrote."""
    from tests.support.gloo import spawn

    spawn(save, world, str(path), options)
    return path
