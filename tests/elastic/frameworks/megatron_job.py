"""Trains a tiny GPT by Megatron-Core under torchrun, and loses ranks where it is told to.

Orders are objects {"epoch", "rank", "step", "at", "how"}: in the "forward" pass of a step's last micro-batch, before
the "optimizer", when a "save" has begun, or in "resume", the process is killed, or stopped. After the step that
"waits" has for an epoch nothing happens any more.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SAMPLES, MICRO = 10, 3


def main() -> None:
    from ucp.elastic import Batch, Memory, Needs, Run, prefer

    order = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    with Run(
        order["url"],
        layouts=prefer({int(ranks): sizes for ranks, sizes in order["layouts"].items()}),
        batch=Batch(SAMPLES, micro=MICRO),
        needs=Needs(divides={"tp": [4, 32, 48], "pp": [4]}),
        memory=Memory(every=order["memory"], copies=2, root=order["root"]) if order.get("memory") else None,
        every=order.get("every", 100),
        timeout=order.get("timeout", 60),
    ) as run:
        if run.active:
            Training(run, order).train()
        else:
            tell(run, order, spare=True)


class Training:
    """A job on this rank."""

    def __init__(self, run: Any, order: dict[str, Any]) -> None:
        from tests.elastic.frameworks import megatron_model as model
        from ucp import Rng
        from ucp.elastic import Feed
        from ucp.elastic.megatron import initialize_model_parallel

        self.run, self.order, self.model, self.at_step = run, order, model, 0
        initialize_model_parallel(run)
        dropout = {"hidden_dropout": order.get("dropout", 0.0), "attention_dropout": order.get("dropout", 0.0)}
        options = {"variable_seq_lengths": True, **dropout}
        self.chunks = model.build(run.mesh, distributed=order.get("distributed", True), **options)
        self.optimizer, self.scheduler, self.tracker = model.optimizer(
            self.chunks, distributed=order.get("distributed", True)
        )
        self.feed = Feed(model.dataset(), run.batch, seed=3)
        self.feed.place(*run.seat)
        self.state = {
            "model": self.chunks,
            "optimizer": self.optimizer,
            "opt_param_scheduler": self.scheduler,
            "rng": Rng(),
            "rng_tracker": self.tracker,
            "feed": self.feed,
        }

    def train(self) -> None:
        """To the end, or until something happens."""
        run, order = self.run, self.order
        self.obey("resume")
        found = run.resume(self.state)
        told = {"tier": getattr(found, "tier", None), "changed": getattr(found, "reconfigured", None)}
        tell(run, order, resumed=run.done, mesh=dict(run.mesh.axes), streams=self.streams(), **told)
        for self.at_step in run.steps(order["steps"]):
            loss = self.step()
            tell(run, order, step=self.at_step, loss=loss, samples=self.feed.samples, seat=run.seat)
            run.step(self.at_step, self.state)
            self.obey("save")
            if self.at_step == order.get("waits", {}).get(str(run.epoch)):
                time.sleep(3600)  # until somebody kills it
        tell(run, order, end=run.report.doc)

    def step(self) -> float:
        """One step; this rank's part of the loss of the whole batch, on the last stage alone."""
        from megatron.core import parallel_state as ps
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from ucp.elastic.megatron import micro_batches

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        given = micro_batches(self.feed, self.chunks, weighted=True)
        given["data_iterator"] = self.watched(given["data_iterator"], given["num_microbatches"])
        losses = get_forward_backward_func()(
            forward_step_func=self.model.forward(_loss, weighted=True),
            model=self.chunks,
            seq_length=self.model.LENGTH,
            forward_only=False,
            **given,
        )
        self.obey("optimizer")
        done, _, _ = self.optimizer.step()
        assert done
        self.scheduler.step(increment=1)
        first = ps.get_tensor_model_parallel_rank() == 0
        return sum(one["loss"].item() for one in losses) / SAMPLES if losses and first else 0.0

    def watched(self, data: Iterator[Any], count: int) -> Iterator[Any]:
        """Be there when the last micro-batch is drawn."""
        for number, one in enumerate(data):
            if number == count - 1:
                self.obey("forward")
            yield one

    def streams(self) -> dict[str, str]:
        """Marks of the random streams that this rank draws from."""
        states = {**self.tracker.get_states(), "default": torch.get_rng_state()}
        return {name: state.numpy().tobytes().hex()[:64] for name, state in states.items()}

    def obey(self, where: str) -> None:
        for one in self.order.get("orders", ()):
            if (one["epoch"], one["rank"], one["step"], one["at"]) == (
                self.run.epoch,
                self.run.rank,
                self.at_step,
                where,
            ):
                os.kill(os.getpid(), signal.SIGSTOP if one.get("how") == "stop" else signal.SIGKILL)


def _loss(losses: torch.Tensor, mask: torch.Tensor, factor: float) -> Any:
    del mask
    return losses.mean() * factor, {"loss": losses.detach().mean() * len(losses)}


def tell(run: Any, order: dict[str, Any], **what: Any) -> None:
    """Add a record in one write: no rank is killed in the middle of it by its own hand."""
    with Path(order["out"], f"{run.epoch:05}-{run.rank}").open("a") as file:
        file.write(json.dumps({**what, "epoch": run.epoch, "rank": run.rank}) + "\n")


if __name__ == "__main__":
    main()
