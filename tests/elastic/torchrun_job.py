"""Trains a small model under torchrun, and loses ranks where it is told to; each rank writes what it saw.

Orders are objects {"epoch", "step", "rank", "at", "how"}: at "resume", in the "step", or when its "save" has begun, the
process is killed, stopped, or raises. After step "waits" of the first epoch nothing happens any more.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ucp.elastic import Batch, Local, Memory, Run, keep

SAMPLES, WIDTH = 12, 16


def main():
    order = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    kept = {"tp": 2} if order["kind"] == "tp" else {}
    options = {"memory": None, "local": None}
    if order.get("memory"):
        options["memory"] = Memory(order["memory"], copies=2, root=order["root"] + "/memory", busy="wait")
    if order.get("local"):
        options["local"] = Local(order["root"] + "/local", every=order["local"], copies=2, busy="wait")
    with Run(
        order["url"],
        layouts=keep(**kept, at_most=order.get("at_most")),
        batch=Batch(SAMPLES, micro=SAMPLES),
        every=order["every"],
        timeout=order.get("timeout", 30),
        **options,
    ) as run:
        saw = {"epoch": run.epoch, "rank": run.rank, "world": run.world, "mesh": dict(run.mesh.axes)}
        saw |= {"spare": run.spare, "node": run.node, "steps": {}}
        if run.active:
            train(run, order, saw)
    Path(order["out"], f"{saw['epoch']}-{saw['rank']}.json").write_text(json.dumps(saw))


def train(run, order, saw):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, 1)).double()
    model = placed(model, run, order["kind"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    obey(order, run, 0, "resume")
    found = run.resume((model, optimizer))
    saw |= {"resumed": run.done, "tier": getattr(found, "tier", None)}
    part, parts = run.seat
    for step in run.steps(order["steps"]):
        data = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        mine = data[part::parts]
        # Averaging gradients over ranks gives those of the mean over all samples.
        loss = (model(mine).squeeze(-1) - mine.sum(-1)).square().sum() / SAMPLES
        (loss * parts).backward()
        obey(order, run, step, "step")
        optimizer.step()
        optimizer.zero_grad()
        saw["steps"][step] = loss.item()
        run.step(step, (model, optimizer), metrics={})
        obey(order, run, step, "save")
        if run.epoch == 1 and step == order.get("waits"):
            time.sleep(3600)  # until somebody is killed
    saw["report"] = run.report.doc


def placed(model, run, kind):
    mesh = run.device_mesh("cpu")
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "tp":
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def obey(order, run, step, at):
    """Fail as told: a rank that is killed here is in the middle of whatever runs behind it."""
    for one in order["orders"]:
        if (one["epoch"], one["step"], one["rank"], one["at"]) == (run.epoch, step, run.rank, at):
            if one["how"] == "raise":
                raise ValueError("told to fail")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[one["how"]])


if __name__ == "__main__":
    main()
