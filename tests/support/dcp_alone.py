"""Checkpoints that the real torch.distributed.checkpoint writes from one process, and ways to damage them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex


def save(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """`folder`, after ``dcp.save``."""
    with warnings.catch_warnings():
        # torch says that it saves from one process.
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=None if "storage_writer" in options else folder, no_dist=True, **options)
    return folder


def sample() -> dict[str, Any]:
    """Two parameters with optimizer states by name, as ``get_state_dict`` gives them."""
    torch.manual_seed(1)
    model = {"a.weight": torch.randn(6, 4), "a.bias": torch.randn(6)}
    states = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(t), "exp_avg_sq": torch.rand_like(t)}
        for name, t in model.items()
    }
    groups = [{"params": list(model), "lr": 0.1, "betas": (0.9, 0.99)}]
    return {"model": model, "optim": {"state": states, "param_groups": groups}}


def edit(folder: Path, change: Callable[[Metadata], None]) -> Path:
    """`folder`, its ``.metadata`` after `change`."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def place(metadata: Metadata, key: str) -> Any:
    """The storage info of `key`, which is one item."""
    found = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    assert len(found) == 1
    return found[0]


def index(metadata: Metadata, key: str) -> MetadataIndex:
    """The index of `key`, which is one item."""
    return next(index for index in metadata.storage_data if index.fqn == key)
