"""Lets Megatron-Core 0.16 run without an accelerator. Used in a job's own process only: it changes torch for good."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _OnCpu(TorchFunctionMode):
    """Whoever asks for a tensor on an accelerator gets it on the CPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if "device" in named:
            named["device"] = _device(named["device"])
        if getattr(func, "__name__", "") == "to":
            args = tuple(_device(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        return func(*args, **named)


class _Stream:
    """Stands for CUDA streams and events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _device(device: Any) -> Any:
    number = isinstance(device, int) and not isinstance(device, bool)
    return _CPU if number or str(device).startswith("cuda") else device


def patch() -> None:
    """Point everything that Megatron-Core does on an accelerator at the CPU."""
    _OnCpu().__enter__()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        setattr(cuda, name, _Stream)
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    _patch_megatron()


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Models with its layers can be made and saved without the kernels that compute with them.
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 asks for this name where Transformer Engine is not installed.
        moe_utils.te_general_gemm = None


def patch_optimizers() -> None:
    """Let Megatron-Core's optimizers take tensors on the CPU: they ask for the class by its name."""
    named: Any = torch.Tensor.type

    def kind(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = named(self, *(() if dtype is None else (dtype,)), *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and "cuda" not in found else found

    torch.Tensor.type = kind  # type: ignore[method-assign]
