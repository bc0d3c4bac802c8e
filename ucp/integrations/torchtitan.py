"""torchtitan saves native checkpoints of ucp, and goes on from any checkpoint that ucp reads, at any layout.

One line of the trainer's configuration:

>>> checkpoint = ucp.integrations.torchtitan.CheckpointManager.Config(enable=True, interval=500)  # doctest: +SKIP

When to save, what to keep and where to go on stay torchtitan's own (torchtitan/components/checkpointer/dcp.py, checked
with 0.3.0): what changes is how a state dict is written and read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from ucp.format.native_manifest import ROOT
from ucp.integrations.dcp import Reader, Writer
from ucp.store import open_store

if TYPE_CHECKING:
    CheckpointManager: Any
    """torchtitan's checkpointer, with checkpoints of ucp; options are torchtitan's own. It is made at first use."""

_MODEL = "model"
_OPTIMIZER = "optimizer."
_STEP = re.compile(r"step-(\d+)/")


class _Ways:
    """How a state dict is written and read: the model's names at the top, all but the optimizer as training state."""

    folder: str
    pg: Any
    stager: Any
    states: dict[str, Any]

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: Any,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save `state_dict` to `checkpoint_id`; files of Hugging Face are torchtitan's own affair.

        ConflictError where there is a checkpoint already: none is written over.
        """
        if to_hf:
            return super().dcp_save(  # type: ignore[misc]
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        writer = Writer(checkpoint_id, model="", optimizer=_OPTIMIZER)
        done: Any = None
        if async_mode == "disabled":
            save(state_dict, storage_writer=writer)
        else:
            pinned = async_mode == "async_with_pinned_mem"
            done = async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS if pinned else AsyncCheckpointerType.THREAD,
                async_stager=self.stager if pinned else None,
            )
        if enable_garbage_collection:
            from torchtitan.tools.utils import GarbageCollection

            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return done

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Fill `state_dict` from whatever lies at `checkpoint_id`; with `from_hf` as torchtitan does."""
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)  # type: ignore[misc]
            return
        load(state_dict, storage_reader=Reader(checkpoint_id, model="", optimizer=_OPTIMIZER))
        if _MODEL in self.states:
            self.states[_MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        """The last step with a complete checkpoint, ours or torchtitan's; -1 if there is none."""
        store = open_store(folder or self.folder)
        found = [int(match[1]) for name in store.children() if (match := _STEP.fullmatch(name))]
        complete = [step for step in found if store.exists(f"step-{step}/{ROOT}")]
        own: int = super()._find_load_step(folder)  # type: ignore[misc]
        return max([own, *complete])


@cache
def _checkpointer() -> Any:
    from torchtitan.components.checkpointer.dcp import CheckpointManager as Stock

    class CheckpointManager(_Ways, Stock):  # type: ignore[misc]  # torchtitan may be missing
        """torchtitan's checkpointer, with checkpoints of ucp."""

        @dataclass(kw_only=True, slots=True)
        class Config(Stock.Config):  # type: ignore[misc]
            """The options are torchtitan's own."""

    for made in (CheckpointManager, CheckpointManager.Config):
        made.__qualname__ = made.__qualname__.rpartition("<locals>.")[2]
    return CheckpointManager


def __getattr__(name: str) -> Any:
    if name == "CheckpointManager":
        return _checkpointer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["CheckpointManager"]
