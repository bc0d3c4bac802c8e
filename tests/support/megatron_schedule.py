"""The schedule of learning rate and weight decay of Megatron-Core jobs in tests. Runs inside ranks only."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

MAX_LR = 5e-3
MIN_LR = 1e-4


def schedule_of(optimizer: Any, **options: Any) -> OptimizerParamScheduler:
    """A cosine after two steps of warming up; `options` are further arguments of Megatron-Core's."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=MAX_LR,
        min_lr=MIN_LR,
        lr_warmup_steps=2,
        lr_decay_steps=100,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=100,
        wd_incr_style="constant",
        **options,
    )
