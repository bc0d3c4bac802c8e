"""Trains a small model by a DeepSpeed engine under torchrun, and kills ranks where it is told to.

Orders are objects {"epoch", "rank", "step", "at"}: in the "forward" or "backward" pass of a micro-batch, in the
optimizer's "step", when a "save" has begun, or in "resume", the process kills itself. After step "waits" nothing
happens any more, or only in epoch "waits_in".
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES, MICRO, WIDTH, LENGTH = 11, 3, 9, 50
CLIP, RATE = 0.5, 0.01


def build_model() -> nn.Module:
    """Sizes that nothing divides."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 1))


def build_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Two groups, and a schedule."""
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def dataset() -> TensorDataset:
    given = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return TensorDataset(given, given.sum(-1).sin())


def mean_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found.squeeze(-1) - wanted).square().mean()


def main() -> None:
    from ucp.elastic import Batch, Memory, Run, keep, prefer

    order = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    layouts = {int(ranks): sizes for ranks, sizes in order.get("layouts", {}).items()}
    memory = None
    if order.get("memory"):
        memory = Memory(every=order["memory"], copies=2, root=order["root"], busy="wait")
    with Run(
        order["url"],
        layouts=prefer(layouts) if layouts else keep(),
        batch=Batch(SAMPLES, micro=MICRO),
        memory=memory,
        every=order["every"],
        timeout=order.get("timeout", 60),
    ) as run:
        if run.active:
            train(run, order)
        else:
            tell(run, order, spare=True)


def train(run: Any, order: dict[str, Any]) -> None:
    import deepspeed

    from ucp.elastic import Feed
    from ucp.elastic.deepspeed import batch_config, micro_batches

    model = build_model()
    optimizer, schedule = build_optimizer(model)
    config = {
        **batch_config(run.batch, run.seat[1]),
        "zero_optimization": {"stage": order["stage"]},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    feed = Feed(dataset(), run.batch, seed=3)
    feed.place(*run.seat)
    state = {"engine": engine, "feed": feed}
    dying = Dying(run, order, engine)
    dying.at("resume", 0)
    found = run.resume(state)
    tell(
        run,
        order,
        resumed=run.done,
        tier=getattr(found, "tier", None),
        ranks=run.mesh.size,
        global_steps=engine.global_steps,
    )
    for step in run.steps(order["steps"]):
        dying.step = step
        total = 0.0
        for (given, wanted), backward in micro_batches(engine, feed):
            loss = mean_loss(engine(given), wanted)
            dying.watch(loss)
            backward(loss)
            total += loss.item() * len(given) / SAMPLES
        tell(run, order, step=step, loss=total, samples=feed.samples, global_samples=engine.global_samples)
        run.step(step, state)
        dying.at("save", step)
        if step == order.get("waits") and run.epoch == order.get("waits_in", run.epoch):
            time.sleep(3600)  # until somebody kills it


class Dying:
    """Kills this process in the middle of what it was told."""

    def __init__(self, run: Any, order: dict[str, Any], engine: Any) -> None:
        mine = [one for one in order.get("orders", ()) if (one["epoch"], one["rank"]) == (run.epoch, run.rank)]
        self.orders = {(one["at"], one["step"]) for one in mine}
        self.step = 0
        engine.module[2].register_forward_pre_hook(lambda *_: self.at("forward", self.step))
        base = engine.optimizer.optimizer
        base.register_step_pre_hook(lambda *_: self.at("step", self.step))

    def watch(self, loss: torch.Tensor) -> None:
        """Be there in the backward pass of `loss`."""
        loss.register_hook(lambda _: self.at("backward", self.step))

    def at(self, where: str, step: int) -> None:
        if (where, step) in self.orders:
            os.kill(os.getpid(), signal.SIGKILL)


def tell(run: Any, order: dict[str, Any], **what: Any) -> None:
    """Add a record in one write: no rank is killed in the middle of it by its own hand."""
    with Path(order["out"], f"{run.epoch:05}-{run.rank}").open("a") as file:
        file.write(json.dumps({"epoch": run.epoch, "rank": run.rank, **what}) + "\n")


if __name__ == "__main__":
    main()
