"""Accelerate: `save_state` and `load_state` onto any number of processes, or hooks for the Accelerator's own.

>>> save_state(accelerator, "runs/7/step-1000", step=1000)                                          # doctest: +SKIP
>>> load_state(accelerator, "runs/7/step-1000")                                                     # doctest: +SKIP
>>> manager.step(step, state_of(accelerator))             # with a `ucp.CheckpointManager`          # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator, DistributedType

from ucp.errors import UsageError
from ucp.integrations._lead import Lead
from ucp.lifecycle.shelf import remove_folder
from ucp.store import open_store
from ucp.train.items import Rng
from ucp.train.load import load
from ucp.train.report import LoadReport
from ucp.train.save import SaveReport, save

_REST = "accelerate"
_FOLDER = "ucp"
_SAVED_BY_ITSELF = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where an Accelerator saves models before it asks hooks (accelerate/accelerator.py, ``save_state``)."""


def state_of(accelerator: Accelerator) -> dict[str, Any]:
    """What an Accelerator has prepared, as a state for `ucp.save`, `ucp.load` and `ucp.CheckpointManager`.

    Models and optimizers go by name, schedulers, the gradient scaler, objects registered for checkpointing and random
    streams by the policies of `ucp.load`. Dataloaders are not among them: `ucp.ReshardableSampler` keeps their place.
    """
    if not accelerator._models:
        raise UsageError("the Accelerator has prepared no model", hint="accelerator.prepare(model, optimizer) first")
    state: dict[str, Any] = {
        "model": _only(accelerator._models),
        "rng": Rng(),
        _REST: Lead(_REST, _Step(accelerator)),
        **{f"custom_{number}": one for number, one in enumerate(accelerator._custom_objects)},
    }
    if accelerator._optimizers:
        state["optimizer"] = _only(accelerator._optimizers)
    if accelerator._schedulers:
        state["lr_scheduler"] = _only([getattr(one, "scheduler", one) for one in accelerator._schedulers])
    if accelerator.scaler is not None:
        state["loss_scale"] = accelerator.scaler
    return state


def save_state(accelerator: Accelerator, url: str, **options: Any) -> SaveReport:
    """In place of ``accelerator.save_state(url)``: one checkpoint at `url`. Collective; `options` are `ucp.save`'s."""
    return save(state_of(accelerator), url, **options)


def load_state(accelerator: Accelerator, url: str, **options: Any) -> LoadReport:
    """In place of ``accelerator.load_state(url)``, from any layout. Collective; `options` are `ucp.load`'s."""
    return load(state_of(accelerator), url, **options)


def register(accelerator: Accelerator) -> tuple[Any, Any]:
    """Have ``accelerator.save_state(folder)`` put models and optimizers into ``folder/ucp``, and `load_state` read it.

    For code that calls these itself. The Accelerator goes on to write and read its own files of optimizers, schedulers
    and random streams; its weights are left out. Returns two handles; their ``remove()`` takes the hooks away.
    UsageError where it saves models without asking (FSDP, DeepSpeed, Megatron-LM): use `save_state` there.
    """
    if accelerator.distributed_type in _SAVED_BY_ITSELF:
        raise UsageError(
            f"under {accelerator.distributed_type.value} an Accelerator saves models without asking hooks",
            hint="call ucp.integrations.accelerate.save_state(accelerator, url) and load_state",
        )

    def saving(_: Sequence[Any], weights: list[Mapping[str, Any]], folder: str) -> None:
        if accelerator.is_main_process:
            remove_folder(open_store(folder), _FOLDER)
        accelerator.wait_for_everyone()
        save(_tensors(accelerator), os.path.join(folder, _FOLDER))
        weights.clear()

    def loading(models: list[Any], folder: str) -> None:
        load(_tensors(accelerator), os.path.join(folder, _FOLDER))
        models.clear()

    return accelerator.register_save_state_pre_hook(saving), accelerator.register_load_state_pre_hook(loading)


def _tensors(accelerator: Accelerator) -> dict[str, Any]:
    state = state_of(accelerator)
    return {role: state[role] for role in ("model", "optimizer") if role in state}


def _only(several: Sequence[Any]) -> Any:
    return several[0] if len(several) == 1 else list(several)


class _Step:
    """The Accelerator's count of steps, by which it accumulates gradients."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self.accelerator.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.accelerator.step = state["step"]


__all__ = ["load_state", "register", "save_state", "state_of"]
