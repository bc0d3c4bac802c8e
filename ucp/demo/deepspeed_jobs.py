"""The demo's DeepSpeed jobs: train and save under one ZeRO stage, resume under another. Runs inside ranks only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import deepspeed
import torch
from torch import distributed

from ucp.demo.model import GLOBAL_BATCH, build_model, local_batch, param_groups
from ucp.errors import UcpError

OTHER_SEED = 4242
"""Models that resume start from other weights, so whatever was not loaded shows."""


def prepare_process() -> None:
    """Keep DeepSpeed on gloo, with nothing compiled: its own path where there is no compiler (comm/torch.py)."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_and_save(rank: int, world: int, folder: str, stage: int, before: int, after: int) -> list[float]:
    """Train `before` steps, save, train `after` more; all losses."""
    engine = _engine(world, stage, seed=1)
    losses = _train(engine, rank, world, 0, before)
    engine.save_checkpoint(folder, client_state={"iteration": before})
    return losses + _train(engine, rank, world, before, after)


def resume(rank: int, world: int, folder: str, stage: int, first: int, steps: int) -> list[float]:
    """Load a universal folder with stock DeepSpeed and train from step `first`; the losses."""
    engine = _engine(world, stage, {"checkpoint": {"load_universal": True}}, seed=OTHER_SEED)
    path, _ = engine.load_checkpoint(folder)
    if path is None:
        raise UcpError(f"{folder}: DeepSpeed found no checkpoint there")
    # A job imports this like anything else; the demo is part of ucp, which names no converter.
    import_module("ucp.converters.deepspeed_universal").finish_load(engine, folder)
    return _train(engine, rank, world, first, steps)


def _engine(world: int, stage: int, extra: dict[str, Any] | None = None, *, seed: int) -> Any:
    deepspeed.init_distributed("gloo", verbose=False)
    model = build_model(seed)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # where nothing is said, DeepSpeed clips at 1.0 (runtime/constants.py)
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **(extra or {}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(param_groups(model)), config=config)
    return engine


def _train(engine: Any, rank: int, world: int, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(*local_batch(step, rank=rank, world=world))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses
