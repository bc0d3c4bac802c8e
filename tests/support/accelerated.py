"""Jobs of the real Accelerate over DeepSpeed: the files it puts around a DeepSpeed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate

from tests.support import truth as truths
from tests.support.case import Case
from tests.support.engine import Job, Result, engine_config, scheduler_factory
from tests.support.model import build_model, group_names, local_batch, param_groups
from tests.support.optimizers import build_optimizer


def run(case: Case, rank: int, world: int, out: Path, describe: Any) -> Result:
    """Train with Accelerate, which saves ``ckpt/pytorch_model`` as a DeepSpeed tag among its own files."""
    # Without this Accelerate finds no backend on a CPU, takes every rank for rank 0, and ranks overwrite each other.
    accelerate.PartialState(cpu=True)
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=engine_config(case))
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    model = build_model(seed=case.seed, tied=case.tied, frozen=case.frozen, unused=case.unused)
    names = group_names(model, case.groups)
    optimizer = build_optimizer(case.optimizer, param_groups(model, groups=case.groups))
    scheduler = scheduler_factory(optimizer)
    engine, _, scheduler = accelerator.prepare(model, optimizer, scheduler)
    job = Job(case, engine, names, rank, world)
    before = _accelerate_steps(accelerator, job, scheduler, 0, case.steps)
    accelerator.save_state(str(out / "ckpt"))
    truth, record = truths.gather(job), describe(job)
    after = _accelerate_steps(accelerator, job, scheduler, case.steps, case.more_steps)
    return truth, record, before, after


def _accelerate_steps(accelerator: Any, job: Job, scheduler: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = job.engine(*local_batch(step, rank=job.rank, world=job.world))
        accelerator.backward(loss)
        scheduler.step()
        losses.append(float(accelerator.reduce(loss.detach().double(), reduction="mean")))
    return losses
