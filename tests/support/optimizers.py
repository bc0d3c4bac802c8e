"""Optimizers of the jobs: torch's own, and a sign-momentum one to show that state names are not fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SignMomentum(torch.optim.Optimizer):
    """Steps by the sign of an interpolated momentum (the Lion update); one state, ``exp_avg``, and no step count."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update from the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.to(parameter.dtype), group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        fast, slow = group["betas"]
        momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(torch.lerp(grad, momentum, fast).sign_(), alpha=-group["lr"])
        momentum.lerp_(grad, 1 - slow)


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The named optimizer over the groups, each group keeping only the hyper-parameters this optimizer knows."""
    if name == "adamw":
        return torch.optim.AdamW(groups, eps=1e-8)
    if name == "adamw_fused":
        return _fused(groups)
    if name == "lion":
        return SignMomentum([{**group, "lr": group["lr"] * 0.1} for group in groups])
    bare = [{key: value for key, value in group.items() if key != "betas"} for group in groups]
    if name == "sgd":
        return torch.optim.SGD([{**group, "momentum": group_momentum(i)} for i, group in enumerate(bare)], lr=1e-2)
    if name == "adafactor":
        return torch.optim.Adafactor(bare)
    raise ValueError(f"no optimizer is called {name!r}")


def group_momentum(index: int) -> float:
    """Momentum of the SGD group with this index."""
    return (0.9, 0.8, 0.7)[index]


def _fused(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's FusedAdam with its compiled kernel replaced by the same arithmetic in torch.

    DeepSpeed picks its flat stage-0 wrapper (runtime/fp16/fused_optimizer.py) by this type, and this type keeps a step
    count that is an int, beside a ``step`` and ``bias_correction`` in every group (ops/adam/fused_adam.py).
    """
    from deepspeed.ops.adam import FusedAdam

    class TorchFusedAdam(FusedAdam):  # type: ignore[misc]
        def __init__(self, params: Any) -> None:
            defaults = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
            torch.optim.Optimizer.__init__(self, params, defaults)
            self.adam_w_mode = 1
            self.set_grad_none = True
            self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)
            self.multi_tensor_adam = _multi_tensor_adam

    return TorchFusedAdam(groups)


@torch.no_grad()
def _multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    for grad, value, exp_avg, exp_avg_sq in zip(*tensors, strict=True):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        value.mul_(1 - lr * weight_decay).addcdiv_(exp_avg / (1 - beta1**step), root, value=-lr)
