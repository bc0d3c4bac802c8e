"""What the ranks of the Trainer's tests run."""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ucp.integrations.transformers import UcpCallback

WIDTH, SAMPLES, BATCH = 6, 48, 6


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.x[index].flip(0), "index": torch.tensor(index)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen += index.tolist()
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


class Stop(TrainerCallback):
    """A signal to one rank, as a step begins."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank, self.at = rank, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank and state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    rank: int, world: int, url: str, steps: int, options: dict[str, Any] | None = None, told: int | None = None
) -> Any:
    """Train up to `steps`, going on with what there is, the samples of a step being the same on any number of ranks."""
    warnings.simplefilter("ignore")
    callback = UcpCallback(url, every=3, keep_latest=2, best=("eval_loss", "min"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH // world,
            learning_rate=1e-2,
            lr_scheduler_type="inverse_sqrt",
            warmup_steps=2,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=11,
            **(options or {}),
        )
        set_seed(5)
        model = Net()
        stop = [] if told is None else [Stop(told, 4)]
        trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback, *stop])
        trainer.train(resume_from_checkpoint=callback.resume(trainer))
        left = list(Path(folder).glob("checkpoint-*"))
    optimizer = trainer.optimizer.optimizer
    state: dict[str, torch.Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}/{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return {
        "resumed": None if callback.resumed is None else callback.resumed.step,
        "step": trainer.state.global_step,
        "seen": model.seen,
        "state": state,
        "lr": optimizer.param_groups[0]["lr"],
        "logged": [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row],
        "rng": torch.get_rng_state(),
        "saved": [saved.step for saved in callback.manager.saved],
        "best": callback.manager.best,
        "own": left,
        "preempted": callback.manager.preempted,
    }


def without_asking(rank: int, world: int, url: str) -> str:
    callback = UcpCallback(url, every=3)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
        trainer = Trainer(Net(), arguments, train_dataset=Rows(), callbacks=[callback])
        try:
            trainer.train()
        except ValueError as error:
            return f"{error} {error.__notes__}"
    return ""
