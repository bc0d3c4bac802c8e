"""Megatron-Core's ``dist_checkpointing`` saves and loads through ucp: the strategy is the only thing that changes.

>>> dist_checkpointing.save(state, folder, SaveStrategy())                            # doctest: +SKIP
>>> state = dist_checkpointing.load(state, folder, LoadStrategy())                    # doctest: +SKIP

Tensors become a native checkpoint in `folder`; ``common.pt``, sharded objects and ``metadata.json`` stay as
Megatron-Core has them. Interfaces: megatron/core/dist_checkpointing/strategies/base.py, checked with 0.16.1.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    LoadShardedStrategy,
    StrategyAction,
    register_default_strategy,
)
from torch import distributed

from ucp.checkpoint import open_checkpoint
from ucp.train.frameworks.megatron_places import leaves, named
from ucp.train.load import load
from ucp.train.save import async_save, save

BACKEND, VERSION = "ucp", 1
"""What ``metadata.json`` says of such checkpoints."""

_KEYS = "megatron_keys"
"""Training state that lists the keys that were saved, each with its dtype: values that an optimizer keeps have two."""

_STATE = "state"
_POLL = 0.05


class SaveStrategy(AsyncSaveShardedStrategy):  # type: ignore[misc]
    """Every rank writes its own shards, replicas once; optimizer states are stored by the name of their parameter.

    Raises as `ucp.save` does: FitError, ConflictError for replicas that differ and where there is a checkpoint already,
    StorageError. Under ``async_sharded_save=True`` the state is copied when ``dist_checkpointing.save`` returns.
    """

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Save the sharded tensors of all ranks."""
        save(_told(sharded_state_dict), str(checkpoint_dir))

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> AsyncRequest:
        """Copy them and write in the background; whoever has scheduled the request hears of failures in its end."""
        handle = async_save(_told(sharded_state_dict), str(checkpoint_dir))
        descriptor, marker = tempfile.mkstemp(prefix="ucp-save-")
        os.close(descriptor)

        def finish() -> None:
            Path(marker).unlink(missing_ok=True)
            handle.result()

        handle.committed.add_done_callback(lambda _: Path(marker).unlink(missing_ok=True))
        return AsyncRequest(_wait, (marker, os.getpid()), [finish])


def _wait(marker: str, trainer: int) -> None:
    """Return when a save is over: in a process of Megatron-Core's, which asks it whether that is so."""
    with suppress(ProcessLookupError):
        while Path(marker).exists():
            os.kill(trainer, 0)
            time.sleep(_POLL)


class LoadStrategy(LoadShardedStrategy):  # type: ignore[misc]
    """Fills sharded tensors at any layout from what `SaveStrategy` saved, or `ucp.save` of such a job.

    `verify` checks what is read against checksums. What is asked for and not there is a CheckpointingException.
    """

    def __init__(self, *, verify: bool = True) -> None:
        self.verify = verify

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        """Fill the sharded tensors; the same dict, with tensors in their place."""
        for one in _tensors(sharded_state_dict):
            one.init_data("cpu", torch.zeros)
        report = load({_STATE: sharded_state_dict}, str(checkpoint_dir), strict=False, verify=self.verify)
        if report.missing:
            raise CheckpointingException(f"{checkpoint_dir} has no {', '.join(report.missing)}")
        return sharded_state_dict

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Shape and dtype of every tensor by its key."""
        catalog = open_checkpoint(str(checkpoint_dir)).catalog
        found = {}
        for key, dtype in catalog.state.get(_KEYS, {}).items():
            name, state = named(key)
            shape = catalog.tensors[name].states[state].shape
            meta = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            found[key] = ShardedTensor.from_rank_offsets(key, meta).without_data()
        return found

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """CheckpointingException for checkpoints of other strategies."""
        if loaded_backend != BACKEND:
            raise CheckpointingException(f"this strategy loads {BACKEND} checkpoints, not {loaded_backend}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        """CheckpointingException for checkpoints of later versions."""
        if loaded_version > VERSION:
            raise CheckpointingException(f"version {loaded_version} is later than {VERSION}: install a later ucp")


def _tensors(tree: Any) -> Iterator[Any]:
    yield from (one for one in leaves(tree) if isinstance(one, ShardedTensor))


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """What is saved: the sharded tensors, and the keys of all ranks."""
    mine = {one.key: str(one.dtype).removeprefix("torch.") for one in _tensors(state)}
    everyone: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, mine)
    keys = {key: dtype for one in everyone for key, dtype in one.items()}
    return {_STATE: state, _KEYS: dict(sorted(keys.items()))}


# From here on ``dist_checkpointing.load`` finds it by itself, and ("ucp", 1) names the other one.
register_default_strategy(StrategyAction.LOAD_SHARDED, BACKEND, VERSION, LoadStrategy())
register_default_strategy(StrategyAction.SAVE_SHARDED, BACKEND, VERSION, SaveStrategy())
