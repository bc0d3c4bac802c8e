"""Hugging Face Trainer: `UcpCallback` saves and resumes what it trains, on any number of processes.

>>> ucp_callback = UcpCallback("runs/7", every=500, keep_latest=3)                                  # doctest: +SKIP
>>> trainer = Trainer(model, TrainingArguments("out", save_strategy="no"), callbacks=[ucp_callback])  # doctest: +SKIP
>>> trainer.train(resume_from_checkpoint=ucp_callback.resume(trainer))                              # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ucp.checkpoint import open_checkpoint
from ucp.errors import UsageError
from ucp.integrations._lead import Lead, told_by_rank_0
from ucp.train.items import Rng
from ucp.train.manager import CheckpointManager, Resumed

_log = logging.getLogger("ucp")
_REST = "trainer"


class UcpCallback(TrainerCallback):
    """Saves a Trainer's run by a `CheckpointManager`, whose arguments it takes, counting the Trainer's global steps.

    The model, the optimizer and the scheduler go by name and thus onto any number of processes and any way to shard;
    random streams by the policy of `ucp.Rng`; the Trainer's own state (steps, logs, callbacks) as it is. The metric of
    `best` is one that evaluation gives, such as ``eval_loss``: what is due at a step that is evaluated is saved after
    that. When the job is being ended (SIGTERM), the run is saved and stopped. The Trainer's own saving is best
    switched off: ``save_strategy="no"``.
    """

    def __init__(self, url: str, **manager: Any) -> None:
        self.manager = CheckpointManager(url, **manager)
        self.resumed: Resumed | None = None
        self._trainer: Any = None
        self._rng = Rng()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def resume(self, trainer: Trainer, *, step: int | None = None, **options: Any) -> str | None:
        """What ``trainer.train(resume_from_checkpoint=…)`` takes to go on; None, for a new run. Collective.

        The newest complete checkpoint is taken, or that of `step`; `options` are those of `ucp.load`. The Trainer
        finds its place in the data by its own means, the number of steps: the samples per step must stay the same
        when the number of processes changes, else another part of the data is gone on with, of which the log warns.
        """
        self._trainer = trainer
        taken = self.manager.find(step)
        if taken is None:
            return None
        with open_checkpoint(taken.url) as ckpt:
            told = told_by_rank_0(ckpt.read_state(_REST))
        if told["samples_per_step"] != _samples_per_step(trainer.args):
            _log.warning(
                "%s was saved with %d samples per step, there are %d now: its place in the data is not the same",
                taken.url,
                told["samples_per_step"],
                _samples_per_step(trainer.args),
            )
        self._folder = tempfile.TemporaryDirectory(prefix="ucp-trainer-")
        with open(os.path.join(self._folder.name, TRAINER_STATE_NAME), "w", encoding="utf-8") as file:
            file.write(told["state"])
        self._take_over(trainer, taken.step, options)
        return self._folder.name

    def _take_over(self, trainer: Any, step: int, options: Mapping[str, Any]) -> None:
        """Load where this Trainer would read its own files (transformers/trainer.py, ``_prepare_for_training``)."""
        streams: dict[str, Any] = {}

        def load(_: str | None) -> None:
            state = self._state(trainer.state, trainer.model, trainer.optimizer, trainer.lr_scheduler)
            self.resumed = self.manager.resume(state, step=step, **options)
            streams.update(self._rng.states())

        trainer._load_from_checkpoint = lambda *_, **__: None
        trainer._load_optimizer_and_scheduler = load
        # Skipping the batches that were seen draws random numbers, so the Trainer sets them again after that.
        trainer._load_rng_state = lambda _: self._rng.set_states(streams)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that the run was asked for where it is."""
        if self._trainer is None:
            raise UsageError(
                "the callback does not know its Trainer",
                hint="trainer.train(resume_from_checkpoint=ucp_callback.resume(trainer)), also for a new run",
            )
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save what is due, unless the step is evaluated first."""
        return control if control.should_evaluate else self._step(state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save what is due, with what was measured."""
        training = kwargs.get("optimizer") is not None and state.global_step > 0
        return self._step(state, control, **kwargs) if training else control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the last save."""
        self.manager.close()

    def _step(
        self,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        optimizer: Any,
        lr_scheduler: Any,
        metrics: Mapping[str, Any] = MappingProxyType({}),
        **_: Any,
    ) -> TrainerControl:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        best = self.manager.keep.best
        told = numbers if best is None or best.metric in numbers else None
        self.manager.step(state.global_step, self._state(state, model, optimizer, lr_scheduler), metrics=told)
        control.should_training_stop |= self.manager.preempted
        return control

    def _state(self, state: TrainerState, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
        found = {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": getattr(scheduler, "scheduler", scheduler),
            "rng": self._rng,
            _REST: Lead(_REST, _Rest(self._trainer, state)),
        }
        scaler = self._trainer.accelerator.scaler
        return found if scaler is None else {**found, "loss_scale": scaler}


class _Rest:
    """The Trainer's own state, as it writes it (transformers/trainer.py, ``_save_checkpoint``)."""

    def __init__(self, trainer: Any, state: TrainerState) -> None:
        self.trainer, self.state = trainer, state

    def state_dict(self) -> dict[str, Any]:
        """The text of its file ``trainer_state.json``, and the samples of one step."""
        told = dataclasses.asdict(self.state)
        callbacks = [*self.trainer.callback_handler.callbacks, self.trainer.control]
        kept: dict[str, Any] = {}
        for callback in (each for each in callbacks if isinstance(each, ExportableState)):
            kept.setdefault(type(callback).__name__, []).append(callback.state())
        told["stateful_callbacks"] = {name: one if len(one) > 1 else one[0] for name, one in kept.items()}
        return {"state": json.dumps(told), "samples_per_step": _samples_per_step(self.trainer.args)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: the Trainer has read the file that `resume` made of it."""


def _samples_per_step(args: TrainingArguments) -> int:
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


__all__ = ["UcpCallback"]
