"""DeepSpeed's optimizers as torch's own: the same states and hyper-parameters, with the parameters in their groups.

ZeRO-3 empties the groups between steps (deepspeed/runtime/zero/stage3.py, ``_create_fp32_partitions``), and the memory
that DeepSpeedCPUAdam has outside of Python goes with it (deepspeed/ops/adam/cpu_adam.py, ``__del__``). So a stand-in is
taken apart, not the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def twin_of(
    base: torch.optim.Optimizer, groups: Sequence[Sequence[torch.Tensor]]
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """A stand-in for `base` with `groups` of parameters, and what gives the original its hyper-parameters.

    States are shared: what is put into the one is in the other.
    """
    kind = type(f"{type(base).__name__}", (type(base),), {"__del__": _stay, "__module__": type(base).__module__})
    twin: Any = object.__new__(kind)
    twin.__dict__.update(vars(base))
    twin.param_groups = [
        {**group, "params": list(members)} for group, members in zip(base.param_groups, groups, strict=True)
    ]

    def install() -> None:
        for own, given in zip(base.param_groups, twin.param_groups, strict=True):
            own.update({key: value for key, value in given.items() if key != "params"})

    return twin, install


def _stay(self: Any) -> None:
    """The original still uses what it would free."""


class SchedulerTwin:
    """A learning-rate scheduler whose optimizer is the stand-in, so that its groups tell whose they are."""

    def __init__(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = scheduler
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the scheduler."""
        self.scheduler.load_state_dict(state)

    def get_last_lr(self) -> Any:
        """What it set last."""
        return self.scheduler.get_last_lr()
