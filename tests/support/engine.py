"""Real DeepSpeed engines on CPU: configuration, construction, steps.  Only ever imported inside a job's own process."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, distributed

from tests.support.case import Case
from tests.support.model import GLOBAL_BATCH, build_model, group_names, local_batch, param_groups
from tests.support.optimizers import build_optimizer

_LATE_IMPORTS = (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "torch._inductor.compile_fx",
)

Result = tuple[dict[str, Tensor], dict[str, Any], list[float], list[float]]
"""What a job hands back: truth, record, losses before the save, losses after it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A running engine with what is needed to train and to describe it."""

    case: Case
    engine: Any
    groups: list[list[str]]
    """Parameter names of each optimizer group on this rank, in the optimizer's order."""
    rank: int
    world: int

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer wrapper, or the plain torch optimizer (stage 0 in fp32)."""
        return self.engine.optimizer

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer under any wrapper."""
        base: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return base


def prepare_process() -> None:
    """Make DeepSpeed usable on a plain CPU, before ranks are forked.

    What its engines import when they are made, torch's compiler among it, is imported here: once, and not by each rank,
    where it took most of the time.
    The shared-memory all-reduce is declared incompatible so that collectives run on gloo and nothing is compiled;
    DeepSpeed itself takes that path on machines without Linux or a compiler (comm/torch.py, build_shm_op).
    """
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    # DeepSpeed collects garbage a lot; a million objects of imported modules need not be looked through each time.
    gc.freeze()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    # torch computes float16 on any CPU; the accelerator only knows whether it is fast there.
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]


def engine_config(case: Case, *, load_universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of the case."""
    zero: dict[str, Any] = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    if case.sub_group_size is not None:
        zero["sub_group_size"] = case.sub_group_size
    if case.round_robin:
        zero["round_robin_gradients"] = True
    if case.parameter_alignment:
        zero["parameter_alignment"] = True
    if case.elastic:
        zero["elastic_checkpoint"] = True
    if case.gather_16bit:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // case.data_parallel,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": case.loss_scale_power, "loss_scale_window": 2}
    if case.grad_accum_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if load_universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def scheduler_factory(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that changes the learning rate of every group at every step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))


def build_job(case: Case, rank: int, world: int, *, load_universal: bool = False) -> Job:
    """The case's model, optimizer and scheduler inside a DeepSpeed engine."""
    deepspeed.init_distributed("gloo", verbose=False)
    model = build_model(seed=case.seed, tied=case.tied, frozen=case.frozen, unused=case.unused)
    optimizer = build_optimizer(case.optimizer, param_groups(model, groups=case.groups))
    names = group_names(model, case.groups)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler_factory if case.scheduler else None,
        config=engine_config(case, load_universal=load_universal),
    )
    return Job(case, engine, names, rank, world)


def train(job: Job, first: int, count: int) -> list[float]:
    """Train `count` steps from step `first`; the losses averaged over ranks, the same on every rank."""
    losses = []
    for step in range(first, first + count):
        inputs, labels = local_batch(step, rank=job.rank, world=job.world)
        loss: Tensor = job.engine(inputs, labels)
        job.engine.backward(loss)
        job.engine.step()
        mean = loss.detach().double().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / job.world)
    return losses
