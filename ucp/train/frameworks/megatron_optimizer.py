"""Megatron-Core's optimizers: which memory holds the fp32 values of which parameter, and what derives from these.

Facts: megatron/core/optimizer/optimizer.py (``Float16OptimizerWithFloat16Params``, ``FP32Optimizer``,
``ChainedOptimizer``) and distrib_optimizer.py (``DistributedOptimizer``: ``gbuf_ranges`` say which elements of which
parameter a data-parallel rank keeps), checked with 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ucp.errors import FitError

_SHARDED = "give the dict of optimizer.sharded_state_dict(...) instead"


@dataclass(frozen=True, slots=True)
class Master:
    """`main` holds the fp32 values of a model's `parameter`: the whole of it, or 1-D its elements from `start` on."""

    parameter: torch.Tensor
    main: torch.Tensor
    start: int | None = None


def chained(optimizer: Any) -> list[Any]:
    """The single optimizers of one that may be several, without those that train nothing on this rank."""
    several = getattr(optimizer, "chained_optimizers", None)
    found = [optimizer] if several is None else [one for inner in several for one in chained(inner)]
    return [one for one in found if not getattr(one, "is_stub_optimizer", False)]


def masters(optimizer: Any) -> Iterator[Master]:
    """What a single optimizer trains. FitError for one whose memory is not known."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if isinstance(optimizer, DistributedOptimizer):
        yield from _distributed(optimizer)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for low, main in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from (Master(*pair) for pair in zip(low, main, strict=True))
        for group in optimizer.fp32_from_fp32_groups:
            yield from (Master(parameter, parameter) for parameter in group)
    elif isinstance(optimizer, FP32Optimizer):
        for group in optimizer.optimizer.param_groups:
            yield from (Master(parameter, parameter) for parameter in group["params"])
    else:
        raise FitError(f"a {type(optimizer).__name__} of Megatron-Core is not known", hint=_SHARDED)
    if not isinstance(optimizer.optimizer, torch.optim.Optimizer):
        raise FitError(f"a {type(optimizer.optimizer).__name__} is no torch optimizer", hint=_SHARDED)


def _distributed(optimizer: Any) -> Iterator[Master]:
    if optimizer.ddp_config.use_megatron_fsdp:
        raise FitError("Megatron FSDP keeps its states as DTensors", hint=_SHARDED)
    if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        raise FitError("a precision-aware optimizer keeps scaled states", hint=_SHARDED)
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, held in bucket["param_map"].items():
                    group, order = optimizer.model_param_group_index_map[parameter]
                    main = optimizer.optimizer.param_groups[group]["params"][order]
                    if main is None or main.numel() != held["param"].end - held["param"].start:
                        raise FitError("the distributed optimizer keeps other elements than its ranges say")
                    yield Master(parameter, main, held["param"].start)


def refresher(optimizers: list[Any]) -> Callable[[], None]:
    """What makes the model's weights from fp32 values that were loaded, as after a step. Collective."""

    def refresh() -> None:
        chunks = list({id(chunk): chunk for optimizer in optimizers for chunk in _gathering(optimizer)}.values())
        for chunk in chunks:
            _finish_gathering(chunk)
        for optimizer in optimizers:
            copy = getattr(optimizer, "_copy_main_params_to_model_params", None)
            if copy is not None:
                copy()
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)

    return refresh


def _gathering(optimizer: Any) -> list[Any]:
    """Model chunks whose weights are put together from what data-parallel ranks keep."""
    return list(optimizer.model_chunks) if hasattr(optimizer, "gbuf_ranges") else []


def _finish_gathering(chunk: Any) -> None:
    """Wait for weights of the last step that are still on their way (``overlap_param_gather``).

    ``start_param_sync`` would wait for these and gather nothing else.
    """
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)
