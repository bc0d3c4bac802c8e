"""Lightning: `UcpCheckpoint`, a callback for every strategy, and `UcpCheckpointIO`, the files of others' callbacks.

>>> trainer = Trainer(callbacks=[UcpCheckpoint("runs/7", every=1000, keep_latest=3)])     # doctest: +SKIP
>>> trainer.fit(model)             # goes on where the run left off, on any number of devices    # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call
from torch import distributed

from ucp.checkpoint import open_checkpoint
from ucp.integrations._lead import Lead, told_by_rank_0
from ucp.lifecycle.shelf import remove_folder
from ucp.store import open_store
from ucp.train.manager import CheckpointManager, Resumed
from ucp.train.manager.preempt import Preemption, Signal
from ucp.train.save import save

_TENSORS = "state_dict"
_REST = "lightning"


class UcpCheckpoint(Checkpoint):
    """Saves and resumes a run by a `CheckpointManager`, whose arguments it takes, counting Lightning's global steps.

    ``trainer.fit`` goes on from the newest complete checkpoint at `url`, if there is one; `resumed` says which. The
    module and the optimizers go by name and thus onto any number of devices and any strategy; Lightning's loops,
    callbacks, data module and precision plugin go on as they do from its own checkpoints. `resume` are arguments of
    `CheckpointManager.resume`, such as ``{"damaged": "older"}``; None never resumes. The metric of `best` is one that
    was logged. When the job is being ended (`preempt`), the run is saved and stopped; while it trains, Lightning does
    not hear these signals: it would end the one rank that got them.
    """

    def __init__(
        self,
        url: str,
        *,
        resume: Mapping[str, Any] | None = None,
        preempt: Iterable[Signal] = ("SIGTERM",),
        **manager: Any,
    ) -> None:
        self.manager = CheckpointManager(url, preempt=(), **manager)
        self._signals = Preemption(preempt)
        self.resumed: Resumed | None = None
        self._resume = resume or {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the run is: the strategy has set up everything, and the loops have not begun."""
        self.resumed = self.manager.resume(_state_of(trainer), **self._resume)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals, now that Lightning has set up its own handlers."""
        self._signals.install()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Save what is due. Where gradients are accumulated, there are several batches to a step."""
        if self._signals.asked:
            self.manager.preempt()
        if trainer.global_step and not trainer.fit_loop._should_accumulate():
            self.manager.step(trainer.global_step, _state_of(trainer), metrics=self._metrics(trainer))
            trainer.should_stop |= self.manager.preempted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last save, and give signals back."""
        self._signals.restore()
        self.manager.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give signals back; the last save ends in the background."""
        self._signals.restore()

    def _metrics(self, trainer: Trainer) -> dict[str, float] | None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = self.manager.keep.best
        return logged if best is None or best.metric in logged else None


def _state_of(trainer: Trainer) -> dict[str, Any]:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    state = {
        "model": trainer.strategy.model,
        "optimizer": list(trainer.optimizers),
        _REST: Lead(_REST, _Rest(trainer)),
    }
    return {**state, "lr_scheduler": schedulers} if schedulers else state


class _Rest:
    """What Lightning's checkpoints hold beside tensors, and Lightning's own way to restore it.

    As `dump_checkpoint` and `restore` do it (lightning/pytorch/trainer/connectors/checkpoint_connector.py).
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.connector = trainer._checkpoint_connector

    def state_dict(self) -> dict[str, Any]:
        """Loops, callbacks, precision plugin, data module, and what the module's own hook adds."""
        trainer: Any = self.trainer
        found = {
            "pytorch-lightning_version": version("lightning"),
            "loops": self.connector._get_loops_state_dict(),
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
        for part in (trainer.precision_plugin, trainer.datamodule):
            kept = part.state_dict() if part is not None else None
            if kept:
                found[type(part).__qualname__] = kept
        call._call_lightning_module_hook(trainer, "on_save_checkpoint", found)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its own back."""
        connector = self.connector
        connector._loaded_checkpoint = state
        connector.restore_datamodule()
        call._call_lightning_module_hook(self.trainer, "on_load_checkpoint", state)
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_loops()
        connector._loaded_checkpoint = {}


class UcpCheckpointIO(CheckpointIO):
    """Lightning's own checkpoints as ucp's: ``Trainer(plugins=[UcpCheckpointIO()])``, with any `ModelCheckpoint`.

    What Lightning hands over is whole and on rank 0: it is for the strategies that do so (DDP, one device). Weights go
    by name, so that `ucp.open` and `ucp.load` take them; optimizers stay in Lightning's form, by number.
    """

    def __init__(self) -> None:
        self._alone: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` as the folder `path`, replacing what is there once it is complete.

        On an object store, where nothing can be renamed, what is there goes first.
        """
        url = os.fspath(path)
        here = "://" not in url and os.path.lexists(url)
        fresh = f"{url}.new" if here else url
        self.remove_checkpoint(fresh)
        rest = {name: value for name, value in checkpoint.items() if name != _TENSORS}
        state = {**checkpoint[_TENSORS], _REST: Lead(_REST, _Held(rest))}
        save(state, fresh, step=checkpoint.get("global_step"), group=self._group())
        if here:
            self.remove_checkpoint(url)
            os.rename(fresh, url)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The same dict again, on the CPU. Nothing that lies there is executed, whatever `weights_only` says."""
        with open_checkpoint(path) as ckpt:
            return {**told_by_rank_0(ckpt.read_state(_REST)), _TENSORS: ckpt.state_dict()}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it, first what makes it a checkpoint; a file of Lightning's own too."""
        parent, slash, name = os.fspath(path).rstrip("/").rpartition("/")
        store = open_store(parent or slash or ".")
        if store.exists(name):
            store.delete(name)
        else:
            remove_folder(store, name)

    def _group(self) -> Any:
        """A group of this rank alone: the others do not call."""
        if self._alone is None and distributed.is_initialized() and distributed.get_world_size() > 1:
            mine = [distributed.get_rank()]
            self._alone = distributed.new_group(mine, backend="gloo", use_local_synchronization=True)
        return self._alone


class _Held:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values


__all__ = ["UcpCheckpoint", "UcpCheckpointIO"]
